"""How sure a score or a difference is: intervals for shares, and tests for two systems on the same items.

Items count as drawn independently. 95 % intervals, two-sided tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from deepen_ext.errors import InputError

_Z = NormalDist().inv_cdf(0.975)  # standard errors of a 95 % interval


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share (Wilson 1927; without continuity correction).

    It stays inside [0, 1] and has a width also where all or none are correct.

    Raises:
        InputError: not 0 <= correct <= total with a total of 1 or more.
    """
    if total < 1 or not 0 <= correct <= total:
        raise InputError(f"{correct} of {total} is no share; give 0 <= correct <= total, and 1 item or more")
    share, spread = correct / total, _Z * _Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # With none and with all correct a bound is 0 or 1 exactly, whatever rounding makes of it.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


@dataclass(frozen=True)
class Paired:
    """Two systems, `a` and `b`, on the same items.

    Attributes:
        difference: accuracy of a minus accuracy of b.
        low, high: its 95 % interval.
        p_value: of McNemar's exact test, that both are equally often right.
        only_a, only_b: how many items only a, or only b, has right; the pairs that the test counts.
        total: how many items.
    """

    difference: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int
    total: int


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """McNemar's exact test on what two systems have right, with the difference of their accuracies.

    The p-value is twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1; where they differ
    nowhere it is 1. The interval is Newcombe's, from Wilson's intervals and the correlation of the pairs
    (Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10): it has a width also where the systems
    differ nowhere. The exact test is the more careful of the two: now and then the interval just leaves out 0
    where the p-value is a little above 0.05. Then nothing has been shown.

    Args:
        a, b: whether each item is right, in the same order.

    Raises:
        InputError: different lengths, or no items.
    """
    total = len(a)
    if total != len(b) or not total:
        raise InputError(
            f"{total} and {len(b)} items do not pair; give both systems' results on the same items"
        )
    pairs = [(bool(one), bool(other)) for one, other in zip(a, b, strict=True)]
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    difference = (only_a - only_b) / total
    low_a, high_a = wilson_interval(both + only_a, total)
    low_b, high_b = wilson_interval(both + only_b, total)
    share_a, share_b = (both + only_a) / total, (both + only_b) / total
    phi = _correlation(both, only_a, only_b, neither)
    below = _third_side(share_a - low_a, high_b - share_b, phi)
    above = _third_side(high_a - share_a, share_b - low_b, phi)
    differ = only_a + only_b
    tail = sum(math.comb(differ, count) for count in range(min(only_a, only_b) + 1))
    p_value = min(2 * tail / (1 << differ), 1.0)  # whole numbers: neither overflows
    return Paired(difference, difference - below, difference + above, p_value, only_a, only_b, total)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi: the correlation of the pairs; one above 0 is corrected for continuity towards 0."""
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    excess: float = both * neither - only_a * only_b
    if not product:
        return 0.0
    if excess > 0:
        excess = max(excess - (both + only_a + only_b + neither) / 2, 0.0)
    return excess / math.sqrt(product)


def _third_side(one: float, other: float, cosine: float) -> float:
    return math.sqrt(max(one * one - 2 * cosine * one * other + other * other, 0.0))
