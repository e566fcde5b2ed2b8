"""Weights as users give them, one for each member."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import real_number


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InputError(f"weights is {weights!r}; give a list of numbers, one for each member")
    weights = [real_number("weight", weight, "0 to 1", lambda _: True) for weight in weights]
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights
