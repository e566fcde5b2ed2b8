"""Numbers and tensors that a caller gives as settings: what they must be, checked in one place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from deepen_ext.errors import InputError


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int.

    Raises:
        InputError: no whole number (True and 2.0 are none), or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | torch.Tensor):
        span = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {value!r}; give a whole number, {span}")
    if number < least or (most is not None and number > most):
        raise InputError(f"{name} is {value}; choose {least} {'or more' if most is None else f'to {most}'}")
    return number


def real_number(name: str, value: Any, words: str, fits: Callable[[float], bool]) -> float:
    """The value as a float.

    Args:
        name: what it is called.
        value: what was given.
        words: what to choose.
        fits: whether a number is in range; NaN must not be.

    Raises:
        InputError: no number (text and True are none), or one that does not fit.
    """
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} is {value!r}, a {type(value).__name__}; give a number, {words}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = float("inf")
    if not fits(number):
        raise InputError(f"{name} is {value}; choose {words}")
    return number


def token_id_tensor(name: str, value: Any) -> torch.Tensor:
    """The value, if it is a tensor of whole numbers; floats would be cut, and a mask read as ids 0 and 1.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor of ids, not {type(value).__name__}")
    if value.dtype == torch.bool:
        raise InputError(f"{name} is a mask (bool); give the ids themselves: {name}.nonzero().flatten()")
    if value.is_floating_point() or value.is_complex():
        raise InputError(f"{name} is {str(value.dtype).removeprefix('torch.')}; give whole numbers (int64)")
    return value


def logits_tensor(name: str, value: Any) -> torch.Tensor:
    """The value, if it is a tensor.

    Raises:
        InputError: it is a list, a numpy array or the like.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{name} must be a torch.Tensor [B, V], not {type(value).__name__}; make one with "
            "torch.as_tensor(...)"
        )
    return value
