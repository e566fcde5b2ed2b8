"""The garbage collector, kept out of the way while a process of our own starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """While modules and models are loaded nothing becomes garbage, and looking for it takes half a second.

    Afterwards it is as it was: a caller may have switched it off for longer.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
