"""KeyboardInterrupt at every call of ours while a text is written: afterwards all is as before.

Of some thousand calls about eight are tried; DEEPEN_INTERRUPTS=1 tries every one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from faulty_members import NEW, PROMPT, arm, check_free, ensemble_of, members_of
from losing_backend import backend_of

import deepen_ext
from deepen_ext import Ensemble
from deepen_ext.ground.cache_folder import atomic_directory, atomic_write
from deepen_ext.members.member import Member

# An interrupt where Python ends a generator that nobody holds: Python goes on, and pytest reports it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
EVERY = int(os.environ.get("DEEPEN_INTERRUPTS", "0"))
PACKAGE = str(Path(deepen_ext.__file__).parent)


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """KeyboardInterrupt at our `at`-th call of a function. Counts the calls, in a list of one."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count[0] += 1
            if count[0] == at + 1:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def members(one_byte_folders: list[Path]) -> list[Member]:
    found = members_of(one_byte_folders)
    for one in found:
        backend_of(one).interrupts = True
    return found


@pytest.fixture(scope="module")
def ensemble(members: list[Member]) -> Ensemble:
    return ensemble_of(members)


WAYS: dict[str, Callable[[Ensemble], Any]] = {
    "generate": lambda one: one.generate([PROMPT, "x"], max_new_tokens=NEW, draft=0, batch_size=1)[1].text,
    "drafts": lambda one: one.generate(PROMPT, max_new_tokens=NEW, draft=2).text,
    "stream": lambda one: "".join(one.stream(PROMPT, max_new_tokens=NEW)),
}


@pytest.mark.parametrize("way", WAYS)
def test_at_every_call(ensemble: Ensemble, members: list[Member], way: str) -> None:
    with interrupted(1 << 60) as calls:
        whole = WAYS[way](ensemble)
    assert calls[0] > 200
    step = 1 if EVERY else calls[0] // 8
    faults = []
    stopped = 0
    for at in range(0, calls[0], step):
        arm(members)
        try:
            with interrupted(at):
                WAYS[way](ensemble)
        except KeyboardInterrupt:
            stopped += 1
        try:
            check_free(members)
            assert WAYS[way](ensemble) == whole
        except Exception as error:
            faults.append((at, repr(error)))
    assert not faults
    assert stopped > 5


def test_a_real_one_at_random_moments(ensemble: Ensemble, members: list[Member]) -> None:
    """SIGINT, which Python notices wherever it is."""
    began = time.perf_counter()
    whole = WAYS["generate"](ensemble)
    took = time.perf_counter() - began
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = 0
    try:
        for number in range(200 if EVERY else 10):
            arm(members)
            finger = threading.Timer(took * (number % 10) / 10, os.kill, (os.getpid(), signal.SIGINT))
            try:
                finger.start()  # which waits, and so may be interrupted itself
                WAYS["generate"](ensemble)
                finger.join()
                time.sleep(0.01)  # where it came too late
            except KeyboardInterrupt:
                stopped += 1
            finger.join()
            check_free(members)
            assert WAYS["generate"](ensemble) == whole
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stopped > 3


@pytest.mark.parametrize("writer", [atomic_write, atomic_directory])
def test_in_a_write(tmp_path: Path, writer: Callable[[Path], Any]) -> None:
    """At every call: the old content or the new one, and no temporary, or one that the next write removes."""

    def write(target: Path) -> None:
        with writer(target) as temporary:
            file = temporary / "file" if writer is atomic_directory else temporary
            file.write_text("new")

    with interrupted(1 << 60) as calls:
        write(tmp_path / "first")
    assert calls[0] >= 4
    for at in range(calls[0]):
        target = tmp_path / f"target-{at}"
        try:
            with interrupted(at):
                write(target)
        except KeyboardInterrupt:
            pass
        if target.exists():
            file = target / "file" if writer is atomic_directory else target
            assert file.read_text() == "new"
        left = list(tmp_path.glob(".*.tmp-*"))
        for path in left:
            os.utime(path, (0, 0))
        write(tmp_path / f"after-{at}")
        assert not list(tmp_path.glob(".target*.tmp-*")) or writer is atomic_directory
