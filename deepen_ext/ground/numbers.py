"""Numbers and switches that a caller gives as settings: what they must be, checked in one place."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from deepen_ext.errors import InputError, shown


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int.

    Raises:
        InputError: no whole number (True and 2.0 are none), or out of range.
    """
    span = f"{least} or more" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {value!r}; give a whole number, {span}")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise InputError(f"{name} is {value}; choose {span}")
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
    if getattr(value, "shape", None) == ():  # a tensor of one number
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


def true_or_false(name: str, value: Any) -> bool:
    """The value, if it is True or False. Else InputError: the text "no" would count as True."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; give True or False")
    return value
