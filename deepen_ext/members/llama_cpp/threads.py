"""How many threads a forward pass gets: all of them, fewer while other programs need the processors.

llama.cpp's threads wait for one another hundreds of times in a forward, and they wait by spinning. Where
another program holds a processor, the thread there comes late each time, and all others spin for as long.
Measured, SmolLM2 on two processors: 9 ms a token with two threads and 13 with one; beside four other busy
processes 194 with two, seconds at worst, and 31 with one. The logits are the same to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from deepen_ext.ground.forks import threads_are_lost

# A forward got its processors if its threads ran for this share of the time. They spin where they wait, so on
# a machine of their own they run all the time.
_ENOUGH = 0.75
_FIRST_WAIT, _LAST_WAIT = 16, 512  # forwards until all threads are tried again


class Threads:
    """Chooses the number of threads of each forward by what the last ones got of the processors.

    Attributes:
        most: the number on a machine of one's own.
        fixed: always take that many.
    """

    def __init__(self, most: int, *, fixed: bool) -> None:
        """Args: see the attributes."""
        self.most = most
        self.fixed = fixed or most == 1
        self._now = most
        self._wait = _FIRST_WAIT
        self._until_tried = 0

    @contextmanager
    def forward(self) -> Iterator[int]:
        """How many threads the forward inside takes; what it gets of the processors counts for the next."""
        if threads_are_lost():
            yield 1
            return
        threads = self._now
        if self.fixed:
            yield threads
            return
        began, ran = time.perf_counter(), time.process_time()
        yield threads
        self.note(threads, (time.process_time() - ran) / max(time.perf_counter() - began, 1e-9))

    def note(self, threads: int, ran: float) -> None:
        """A forward with so many threads had `ran` processors to itself, on average."""
        if threads < self.most:
            self._until_tried -= 1
            if self._until_tried <= 0:
                self._now = self.most
        elif ran < _ENOUGH * threads:
            self._now = max(1, int(ran))
            self._until_tried, self._wait = self._wait, min(2 * self._wait, _LAST_WAIT)
        else:
            self._wait = _FIRST_WAIT
