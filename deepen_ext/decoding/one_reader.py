"""An iterator that is read by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

from deepen_ext.errors import InputError

T = TypeVar("T")


class OneReader(Iterator[T]):
    """A generator, which says what is wrong where two threads ask it for something at once."""

    def __init__(self, steps: Generator[T, None, None]) -> None:
        self._steps = steps
        self._reading = threading.Lock()
        # Set before the lock is tried, looked at after it is given back: one of the two threads ends it.
        self._to_end = False

    def __next__(self) -> T:
        """What comes next.

        Raises:
            InputError: another thread is in a step, or a callback of this step asks for the next.
        """
        if not self._reading.acquire(blocking=False):
            raise InputError(
                "this text is being read already, by another thread or by what called back; "
                "read it in one place, and hand the pieces on"
            )
        try:
            return next(self._steps)
        finally:
            self._reading.release()
            if self._to_end:
                self.close()

    def close(self) -> bool:
        """End the generator; False where a step is being made, after which it ends."""
        self._to_end = True
        if not self._reading.acquire(blocking=False):
            return False
        try:
            self._steps.close()
        finally:
            self._reading.release()
        return True
