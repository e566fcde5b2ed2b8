"""What forward passes cost, as measured: by the number of lanes and the tokens of each."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import deque

_RECENT = 7  # measurements kept of a shape; their median counts
_OLD = 64  # other measurements, after which one counts no more where there is a newer one of its shape
_FEW = 3  # so few are forgotten then, if wider than a token: they may have been disturbed
_NEARLY = 0.25  # more or fewer lanes by this share: a wider forward is taken to cost as much more there


class Costs:
    """Milliseconds of a member's forward passes. No constant of a machine: what is not measured is tried.

    A shape that was never run counts as cheap as it can be, and a width may only be twice the largest one
    known: so a wrong guess costs little, and is known for wrong afterwards.
    """

    def __init__(self) -> None:
        self._run: dict[tuple[int, int], int] = {}  # how often a shape was run
        # By lanes and width; each with its number among all measurements.
        self._recent: dict[tuple[int, int], deque[tuple[int, float]]] = {}
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
        recent = self._recent.setdefault((lanes, width), deque(maxlen=_RECENT))
        recent.append((self._count, ms))
        while self._is_old(recent[0][0]):
            recent.popleft()
        medians = self._medians.get(lanes, {}) | {width: statistics.median(ms for _, ms in recent)}
        if width == 1:  # as a run goes on without drafts
            for other in [w for w in medians if w > 1 and self._is_doubtful(lanes, w)]:
                del medians[other], self._recent[lanes, other]
        self._medians[lanes] = dict(sorted(medians.items()))

    def ms(self, lanes: int, width: int) -> float | None:
        """Expected milliseconds; infinite for a width to be tried later, None where nothing is known.

        What was not measured for a number of lanes is taken from the nearest one. Where only widths were not,
        it is in proportion, from one with nearly as many lanes.
        """
        known = self._known(lanes)
        if not known:
            return None
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

    def _known(self, lanes: int) -> dict[int, float]:
        """By width, in rising order; with nothing for a width of 1 there is nothing."""
        own = self._medians.get(lanes, {})
        others = [n for n, medians in self._medians.items() if n != lanes and 1 in medians]
        if 1 in own:
            others = [n for n in others if len(self._medians[n]) > 1 and abs(n - lanes) <= _NEARLY * lanes]
        if not others:
            return own if 1 in own else {}
        nearest = self._medians[min(others, key=lambda n: abs(n - lanes))]
        # On CUDA what is no member's takes 0 ms at every width: there is nothing to be in proportion to.
        scale = own[1] / nearest[1] if 1 in own and nearest[1] else 1.0
        return dict(sorted(({width: ms * scale for width, ms in nearest.items()} | own).items()))

    def _is_doubtful(self, lanes: int, width: int) -> bool:
        """Measured a few times only, and long ago."""
        recent = self._recent[lanes, width]
        return len(recent) < _FEW and self._is_old(recent[-1][0])

    def _is_old(self, number: int) -> bool:
        return self._count - number > _OLD
