"""Which texts are written now, and which wait (continuous batching; Orca, Yu et al., OSDI 2022)."""

from __future__ import annotations

from collections import deque


class Schedule:
    """Texts 0..count-1, `at_once` of them side by side: where one ends, the next that waits begins.

    Attributes:
        active: the texts being written, in the order of their lanes, so that no logits are copied.
    """

    def __init__(self, count: int, at_once: int) -> None:
        self.active = list(range(at_once))
        self._waiting = deque(range(at_once, count))
        self._begun = list(self.active)

    def begun(self) -> list[int]:
        """The texts that began since the last call."""
        found, self._begun = self._begun, []
        return found

    def end(self, text: int) -> int | None:
        """The text has ended; returns the one that takes its lane, if one waits."""
        at = self.active.index(text)
        following = self._waiting.popleft() if self._waiting else None
        if following is None:
            del self.active[at]
        else:
            self.active[at] = following
            self._begun.append(following)
        return following
