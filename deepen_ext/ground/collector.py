"""The garbage collector, kept out of the way while a process of our own starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """While modules and models are loaded nothing becomes garbage, and looking for it takes half a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
