"""Which texts are written now, and which wait (continuous batching; Orca, Yu et al., OSDI 2022)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence


class Schedule:
    """Texts by number, `lanes` of them at once: where one ends, the next that waits gets its lane.

    Attributes:
        active: the texts being written, in the order of their lanes, so that no logits are copied.
        lanes: of each text that has one.
    """

    def __init__(self, lanes: int) -> None:
        self.active: list[int] = []
        self.lanes: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._free = list(range(lanes))

    def add(self, text: int) -> None:
        """One more text, which waits for a lane."""
        self._waiting.append(text)

    def begin(self, choose: Callable[[int, Sequence[int]], int] | None = None) -> list[int]:
        """Give free lanes to the texts that wait; returns these texts. `start` makes them active.

        Args:
            choose: picks a text's lane of those that are free; None for the first.
        """
        begun = []
        while self._waiting and self._free:
            text = self._waiting.popleft()
            lane = self._free[0] if choose is None else choose(text, self._free)
            self._free.remove(lane)
            self.lanes[text] = lane
            begun.append(text)
        return begun

    def start(self, texts: Sequence[int]) -> None:
        """These texts, which have lanes, are written from now on."""
        if texts:
            self.active = sorted([*self.active, *texts], key=self.lanes.__getitem__)

    def end(self, text: int) -> int:
        """The text, which has a lane, has ended. Returns the lane, which is free now."""
        if text in self.active:
            self.active.remove(text)
        lane = self.lanes.pop(text)
        self._free = sorted([*self._free, lane])
        return lane

    def spare(self) -> list[int]:
        """The free lanes beyond the texts that wait: nobody gets them any more."""
        waiting = len(self._waiting)
        spared, self._free = self._free[waiting:], self._free[:waiting]
        return spared

    def withdraw(self, text: int) -> None:
        """The text, which waits, is not wanted any more."""
        self._waiting.remove(text)

    @property
    def waits(self) -> bool:
        """Whether a text waits for a lane."""
        return bool(self._waiting)
