"""A text as it is written."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator

from deepen_ext.decoding.generation import Generation
from deepen_ext.decoding.loop import Run
from deepen_ext.decoding.one_reader import OneReader
from deepen_ext.ground.closing import Closing


class TextStream(Closing, Iterator[str]):
    """Pieces of one text, whole characters only; a context manager.

    One thread at a time reads it. The work is done as pieces are asked for. `close`, the end of the ``with``
    block or dropping the stream ends it and frees the caches.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pieces = OneReader(
            _read(run)
        )  # holds the run, not the stream: dropping the stream frees all at once
        weakref.finalize(self, run.close).atexit = False

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the work and free the caches; no more pieces come."""
        self._pieces.close()  # where another thread is in a step, the run ends after it
        self._run.close()

    @property
    def result(self) -> Generation:
        """What has been written so far; until the text has its end, `finish_reason` is "cancelled"."""
        return self._run.results()[0]


def _read(run: Run) -> Generator[str, None, None]:
    try:
        for written in run:
            if text := "".join(one.text for one in written):
                yield text
    finally:
        run.close()
