"""The C library's memory in a process that runs for days."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Give what is free in glibc's heap back to the system: by itself it does that at the heap's end alone.

    Logits have another size in every batch, and the caches of a run that nobody used are freed and made anew:
    where one fits no hole, the heap grows. (Seen: 62 MB in an hour.) Another C library has no such call.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
