"""What is left of threads in a forked process: none of OpenMP's, for which its first use would wait for ever.

torch, its matrix products and our core share OpenMP's threads. Where they had started before `os.fork`, the
child computes on one thread: it is slower and says the same.
"""

from __future__ import annotations

import os
import threading

import torch

_had_threads = False
_lost_threads = False


def threads_are_lost() -> bool:
    """Whether this process was forked from one whose threads of OpenMP or of another library had started."""
    return _lost_threads


def _before() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > threading.active_count()
    except OSError:  # nobody says: one thread is always right
        _had_threads = True


def _in_child() -> None:
    global _lost_threads
    if _had_threads:
        _lost_threads = True
        torch.set_num_threads(1)


os.register_at_fork(before=_before, after_in_child=_in_child)
