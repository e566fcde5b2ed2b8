"""What forward passes cost, as measured: by the number of lanes and the tokens of each."""

from __future__ import annotations

import math
import statistics
from collections import deque

_RECENT = 7  # measurements kept of a shape; their median counts
_FEW, _OLD = 3, 64  # so few measurements are forgotten after so many others: one may have been disturbed


class Costs:
    """Milliseconds of a member's forward passes. No constant of a machine: what is not measured is tried.

    A shape that was never run counts as cheap as it can be, and a width may only be twice the largest one
    known: so a wrong guess costs little, and is known for wrong afterwards.
    """

    def __init__(self) -> None:
        self._measured: dict[int, dict[int, deque[float]]] = {}  # by lanes, by width
        self._last: dict[tuple[int, int], int] = {}
        self._count = 0

    def add(self, lanes: int, width: int, ms: float) -> None:
        """A forward pass of so many lanes, of at most `width` tokens each, took so long."""
        self._count += 1
        self._last[lanes, width] = self._count
        own = self._measured.setdefault(lanes, {})
        own.setdefault(width, deque(maxlen=_RECENT)).append(ms)
        if width > 1:
            return
        for other in [w for w, found in own.items() if w > 1 and len(found) < _FEW]:
            if self._count - self._last[lanes, other] > _OLD:
                del own[other]

    def ms(self, lanes: int, width: int) -> float | None:
        """Expected milliseconds; infinite for a width to be tried later, None where nothing is known.

        Of a number of lanes that was not measured, the nearest one's.
        """
        known = [lanes] if lanes in self._measured else sorted(self._measured, key=lambda n: abs(n - lanes))
        own = next((self._measured[n] for n in known if 1 in self._measured[n]), None)
        if own is None:
            return None
        medians = {w: statistics.median(found) for w, found in sorted(own.items())}
        if width in medians:
            return medians[width]
        below = max(w for w in medians if w < width)
        above = min((w for w in medians if w > width), default=None)
        if above is None:
            if width > 2 * below:
                return math.inf
            above = below
            below = 1
            if above == 1:
                return medians[1]
        slope = max(medians[above] - medians[below], 0.0) / (above - below)
        return medians[below] + slope * (width - below)
