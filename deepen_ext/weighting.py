"""How much each member counts: weights given once, or found from how well it reads the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepen_ext.errors import InputError


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    weights = [float(weight) for weight in weights]
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights
