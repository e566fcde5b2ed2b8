"""Weights of members, where not all of them speak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def drawn(members: Sequence[int], weights: Sequence[float], share: float) -> int:
    """The member in whose part of the weights this share of their sum lies; the main model if it is 0."""
    ends = list(accumulate(weights[member] for member in members))
    return next((one for one, end in zip(members, ends, strict=True) if share * ends[-1] < end), members[0])


def without(member: int, weights: Sequence[float]) -> list[float]:
    """The weights without this member's, summing to 1; the main model's is 1 where nothing is left."""
    left = [0.0 if i == member else weight for i, weight in enumerate(weights)]
    total = math.fsum(left)
    return [weight / total for weight in left] if total else [1.0, *left[1:]]
