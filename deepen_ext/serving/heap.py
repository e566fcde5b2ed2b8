"""The C library's memory in a process that runs for days."""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LARGE = 1 << 20  # bytes; below a layer's keys for eight texts in a small model


def return_large_blocks() -> None:
    """Have glibc give blocks of 1 MiB and more back to the system when they are freed.

    By itself it takes blocks of up to 32 MiB from its heap once it has seen one freed. Logits have another
    size in every batch, and the caches of a run that nobody used are freed and made anew: where one fits no
    hole, the heap grows, and stays. (Seen: 62 MB in an hour.) Where `MALLOC_MMAP_THRESHOLD_` is in the
    environment, or another C library, nothing is changed.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE)
