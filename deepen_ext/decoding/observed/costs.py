"""What forward passes cost, as measured: by the number of lanes and the tokens of each."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import deque

_RECENT = 7  # measurements kept of a shape; their median counts
_FEW, _OLD = 3, 64  # so few measurements are forgotten after so many others: one may have been disturbed


class Costs:
    """Milliseconds of a member's forward passes. No constant of a machine: what is not measured is tried.

    A shape that was never run counts as cheap as it can be, and a width may only be twice the largest one
    known: so a wrong guess costs little, and is known for wrong afterwards.
    """

    def __init__(self) -> None:
        self._run: dict[tuple[int, int], int] = {}  # how often a shape was run
        self._recent: dict[tuple[int, int], deque[float]] = {}  # by lanes and width
        self._last: dict[tuple[int, int], int] = {}
        self._medians: dict[int, dict[int, float]] = {}  # by lanes, by width in rising order
        self._count = 0

    def add(self, lanes: int, width: int, ms: float, *, warm_up: int = 0) -> None:
        """A forward pass of so many lanes, of at most `width` tokens each, took so long.

        The first `warm_up` of a shape do not count.
        """
        run = self._run[lanes, width] = self._run.get((lanes, width), 0) + 1
        if run <= warm_up:
            return
        self._count += 1
        self._last[lanes, width] = self._count
        recent = self._recent.setdefault((lanes, width), deque(maxlen=_RECENT))
        recent.append(ms)
        medians = self._medians.get(lanes, {}) | {width: statistics.median(recent)}
        if width == 1:  # as a run goes on without drafts
            for other in [w for w in medians if w > 1 and self._is_doubtful(lanes, w)]:
                del medians[other], self._recent[lanes, other]
        self._medians[lanes] = dict(sorted(medians.items()))

    def ms(self, lanes: int, width: int) -> float | None:
        """Expected milliseconds; infinite for a width to be tried later, None where nothing is known.

        What was not measured for a number of lanes is taken from the nearest one.
        """
        known = self._medians.get(lanes, {})
        if 1 not in known:
            others = [n for n, medians in self._medians.items() if 1 in medians]
            if not others:
                return None
            nearest = self._medians[min(others, key=lambda n: abs(n - lanes))]
            known = dict(sorted((nearest | known).items()))
        if width in known:
            return known[width]
        widths = list(known)
        at = bisect_left(widths, width)
        if at == len(widths):
            if width > 2 * widths[-1]:
                return math.inf
            if len(widths) == 1:
                return known[1]
            at -= 1
        below, above = widths[at - 1], widths[at]
        slope = max(known[above] - known[below], 0.0) / (above - below)
        return known[below] + slope * (width - below)

    def _is_doubtful(self, lanes: int, width: int) -> bool:
        """Measured a few times only, and long ago."""
        return len(self._recent[lanes, width]) < _FEW and self._count - self._last[lanes, width] > _OLD
