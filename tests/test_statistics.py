from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.statistics import Paired, mcnemar, wilson_interval


def paired(both: int, only_a: int, only_b: int, neither: int) -> Paired:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return mcnemar(a, b)


counts = st.integers(0, 40)
tables = st.tuples(counts, counts, counts, counts).filter(any)


# Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand():
    """1 of 2: centre 1/2, half width z sqrt(1/8 + z²/16) / (1 + z²/2) = z / (2 sqrt(2 + z²))."""
    low, high = wilson_interval(1, 2)
    half = 1.959963984540054 / (2 * math.sqrt(2 + 1.959963984540054**2))
    assert half == pytest.approx(0.4055, abs=1e-4)
    assert low == pytest.approx(0.5 - half)
    assert high == pytest.approx(0.5 + half)


@given(st.integers(1, 10**6), st.data())
def test_wilson_holds_the_share_and_solves_the_score_equation(total, data):
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    share = correct / total
    assert 0 <= low <= share <= high <= 1
    assert low < high
    mirrored = wilson_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    for bound in (low, high):  # |share - bound| is 1.96 standard errors of the bound itself
        error = math.sqrt(bound * (1 - bound) / total)
        assert abs(share - bound) == pytest.approx(1.959963984540054 * error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(correct, total):
    with pytest.raises(InputError, match=f"{correct} of {total} is no share"):
        wilson_interval(correct, total)


@pytest.mark.parametrize(
    ("table", "p_value"),
    [
        ((101, 121, 59, 33), 4.434449263755e-06),  # statsmodels' test of its mcnemar(exact=True)
        ((794, 150, 86, 570), 3.716e-05),  # approval of a president; R's exact2x2 (Fay 2010)
        ((1, 1, 7, 12), 0.0703125),  # 2 (1 + 8) / 2**8
        ((0, 9, 1, 0), 22 / 1024),  # 2 (1 + 10) / 2**10
        ((5, 0, 6, 5), 2 / 64),
        ((5, 4, 4, 5), 1.0),
        ((5, 4, 3, 5), 1.0),  # twice the tail is above 1
        ((5, 0, 0, 5), 1.0),
    ],
)
def test_mcnemar_p_value_as_published_or_by_hand(table, p_value):
    result = paired(*table)
    assert result.p_value == pytest.approx(p_value, rel=1e-4)
    assert (result.only_a, result.only_b, result.total) == (table[1], table[2], sum(table))
    assert result.difference == pytest.approx((table[1] - table[2]) / sum(table))


def test_mcnemar_interval_as_published():
    """Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33, 2850-2875), airway hyper-responsiveness
    before and after stem cell transplantation: -0.286, Newcombe's interval -0.507 to -0.026."""
    result = paired(1, 1, 7, 12)
    assert result.difference == pytest.approx(-0.286, abs=5e-4)
    assert (result.low, result.high) == pytest.approx((-0.507, -0.026), abs=5e-4)


def test_mcnemar_interval_by_hand():
    """Equal accuracies: both sides of the interval are Wilson's, joined at phi's angle."""
    low, high = wilson_interval(10, 10)
    result = paired(10, 0, 0, 0)  # phi 0; one side of Wilson's interval is 0
    assert (result.difference, result.low, result.high) == pytest.approx((0, low - high, high - low))
    low, _ = wilson_interval(5, 10)
    result = paired(5, 0, 0, 5)  # phi = (25 - 5) / 25
    half = (0.5 - low) * math.sqrt(2 * (1 - 0.8))
    assert (result.low, result.high) == pytest.approx((-half, half))
    result = paired(0, 5, 5, 0)  # phi -1, which is not corrected
    assert (result.low, result.high) == pytest.approx((-2 * (0.5 - low), 2 * (0.5 - low)))


@given(tables)
def test_mcnemar_against_exact_fractions(table):
    both, only_a, only_b, neither = table
    result = paired(*table)
    count = only_a + only_b
    tail = sum(Fraction(math.comb(count, i), 2**count) for i in range(min(only_a, only_b) + 1))
    assert result.p_value == pytest.approx(float(min(2 * tail, 1)), rel=1e-12)
    assert -1 <= result.low <= result.difference <= result.high <= 1
    assert result.low < result.high
    swapped = paired(both, only_b, only_a, neither)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx(
        (-result.difference, -result.high, -result.low)
    )
    assert swapped.p_value == result.p_value


@given(tables, st.randoms())
def test_mcnemar_does_not_depend_on_the_order_of_items(table, random):
    both, only_a, only_b, neither = table
    pairs = (
        [(True, True)] * both
        + [(True, False)] * only_a
        + [(False, True)] * only_b
        + [(False, False)] * neither
    )
    random.shuffle(pairs)
    assert mcnemar([a for a, _ in pairs], [b for _, b in pairs]) == paired(*table)


def test_mcnemar_interval_covers_the_difference_it_is_of():
    """200 samples of 300 pairs whose true difference is 0.05: about 190 intervals hold it."""
    generator = np.random.default_rng(3)
    kinds = [generator.multinomial(300, [0.4, 0.15, 0.10, 0.35]) for _ in range(200)]
    results = [paired(*map(int, kind)) for kind in kinds]
    held = sum(one.low <= 0.05 <= one.high for one in results)
    assert 180 <= held <= 199  # 95 % of 200, three standard errors either way
    assert any(one.low > 0 for one in results)


def test_mcnemar_of_thousands_of_items():
    assert paired(0, 7000, 0, 0).p_value == 0.0  # 2 ** -6999 is below what a float holds
    assert 0.04 < paired(2000, 1121, 1028, 2000).p_value < 0.06  # 93 apart, sqrt(2149) = 46.4: z is near 2


def test_mcnemar_refuses_what_does_not_pair():
    with pytest.raises(InputError, match="2 and 1 items do not pair"):
        mcnemar([True, False], [True])
    with pytest.raises(InputError, match="0 and 0 items"):
        mcnemar([], [])
