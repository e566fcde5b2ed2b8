"""Weights of members, where not all of them speak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate


def drawn(members: Sequence[int], weights: Sequence[float], share: float) -> int:
    """The member in whose part of the weights this share of their sum lies; the main model if it is 0."""
    ends = list(accumulate(weights[member] for member in members))
    return next((one for one, end in zip(members, ends, strict=True) if share * ends[-1] < end), members[0])


def handed_over(weights: Sequence[float], shares: Mapping[int, float]) -> Sequence[float]:
    """The weights where members keep these shares of theirs, 0 to 1, and the main model gets the rest.

    An assistant that does not count more than the main model keeps all or nothing, which is not handed over:
    with nothing it sits out, and the weights of those that speak are scaled to sum to 1.
    """
    less = {i: share for i, share in shares.items() if share < 1 and weights[i] > weights[0]}
    if not less:
        return weights
    own = [weight * less.get(i, 1.0) for i, weight in enumerate(weights)]
    own[0] += math.fsum(weights) - math.fsum(own)
    return own


def without(member: int, weights: Sequence[float]) -> list[float]:
    """The weights without this member's, summing to 1; the main model's is 1 where nothing is left."""
    left = [0.0 if i == member else weight for i, weight in enumerate(weights)]
    total = math.fsum(left)
    return [weight / total for weight in left] if total else [1.0, *left[1:]]
