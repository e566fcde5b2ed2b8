"""bench/soak.py: the slope that it states."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))  # at the end: its conftest must not come before this folder's

import soak  # noqa: E402

HOURS = [place / 100 for place in range(100)]


def test_the_slope_of_a_line_is_exact() -> None:
    found, error = soak.slope(HOURS, [3.0 + 2.0 * hour for hour in HOURS])
    assert found == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("follow", [0.0, 0.8])
def test_the_true_slope_lies_within_the_stated_error(follow: float) -> None:
    """Also where what is left over follows itself. The slope 5 lies within two errors in 95 of 100 runs."""
    within = 0
    for seed in range(200):
        noise, last = random.Random(seed), 0.0
        values = []
        for hour in HOURS:
            last = follow * last + noise.gauss(0, 1)
            values.append(5.0 * hour + last)
        found, error = soak.slope(HOURS, values)
        within += abs(found - 5.0) <= 2 * error
    assert within >= 170


def test_what_came_of_a_process_leaves_the_warm_up_out() -> None:
    samples = [
        {"hours": hour, "library": {"rss, MB": 900 if hour < 0.2 else 100, "open files": 8, "threads": 3}}
        for hour in HOURS
    ]
    found = soak.summary(samples, "library", 0.2)
    assert found["rounds"] == 80
    assert found["slope, KB an hour"] == 0.0
    assert found["rss, MB"] == [100, 100]
    assert found["open files"] == [8, 8]


def test_what_comes_and_goes_has_not_grown() -> None:
    assert not soak.has_grown([7, 8, 7, 8, 8, 7, 8, 9])
    assert soak.has_grown([7, 8, 7, 8, 9, 10, 11, 12])
    assert not soak.has_grown([7])
