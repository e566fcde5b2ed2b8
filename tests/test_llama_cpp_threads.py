"""How many threads a forward of llama.cpp gets, by what the forwards before it got of the processors; and
threads that ask the library what it said."""

from __future__ import annotations

import threading
import time
from collections import deque
from itertools import pairwise
from pathlib import Path

from deepen_ext.members.llama_cpp.library import Library
from deepen_ext.members.llama_cpp.threads import Threads


def counts(threads: Threads, ran: list[float]) -> list[int]:
    """The number of threads of each forward, where each gets so many processors."""
    found = []
    for share in ran:
        found.append(threads._now)
        threads.note(found[-1], min(share, found[-1]))
    return found


def test_alone_it_takes_all() -> None:
    assert counts(Threads(8, fixed=False), [7.9] * 50) == [8] * 50


def test_beside_others_it_takes_what_is_left_and_tries_again() -> None:
    found = counts(Threads(8, fixed=False), [3.5] * 60)
    assert found[:17] == [8, *[3] * 16]
    assert found[17:50] == [8, *[3] * 32]  # after twice as long
    assert found[50] == 8


def test_it_never_waits_longer_than_so_many_forwards() -> None:
    found = counts(Threads(2, fixed=False), [0.5] * 5000)
    tried = [i for i, one in enumerate(found) if one == 2]
    assert max(b - a for a, b in pairwise(tried)) == 513


def test_when_the_others_are_gone_it_takes_all() -> None:
    threads = Threads(4, fixed=False)
    assert counts(threads, [1.2] * 17) == [4, *[1] * 16]
    assert counts(threads, [4.0] * 20) == [4] * 20
    assert counts(threads, [1.2] * 18) == [4, *[1] * 16, 4]  # and is as patient as at first


def test_a_number_that_the_caller_gave_stays() -> None:
    threads = Threads(4, fixed=True)
    for _ in range(5):
        with threads.forward() as count:
            assert count == 4


def test_the_library_says_something_while_it_is_asked() -> None:
    said: deque[str] = deque(maxlen=20)
    library = Library(call=None, file=Path("lib"), name="lib", _log=None, _said=said)
    stop = threading.Event()

    def say() -> None:
        while not stop.is_set():
            said.append("a warning\n")

    thread = threading.Thread(target=say)
    thread.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert library.complaint() in ("", "a warning")
    finally:
        stop.set()
        thread.join()
