"""kill -9 at random moments of every write, and what is read afterwards. `python kills.py --help` says how.

One process imports everything and forks a child for each kill: it writes, and is killed

    moment   at a random moment of the time that the write takes
    step     just before its n-th change of the file system (a folder made, a file opened to be written,
             flushed, renamed, removed), for a random n
    after    within a random time after that change

The first process reads afterwards, by the package's own readers. Where temporaries are left behind, it lets
an hour pass, writes once more and looks whether they are gone. It has no other thread: a child would lack it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

WAYS = ("moment", "step", "after")
TESTS = Path(__file__).resolve().parent.parent
SECONDS = 60  # for a child: one that waits for ever is a fault
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.symlink", "os.truncate"}


class Write(Protocol):
    """A write of the package.

    Attributes:
        name: for the table.
    """

    name: str

    def prepare(self, shared: Path) -> None:
        """Make the inputs in this folder, once."""

    def before(self, place: Path) -> None:
        """Make what is in this folder before the write."""

    def write(self, place: Path) -> None:
        """Write."""

    def read(self, place: Path) -> str:
        """Check everything that is there. Returns "old", "new", "part" (whole lines) or "rebuilt"."""


def _in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Do this in a forked process; its id, and a pipe that it writes to."""
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a child would lack threads of this process: {threading.enumerate()}"
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)
    gc.disable()  # it would look at all objects, and so copy all pages
    try:
        work(writer)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _end(child: int, pipe: int, seconds: float = SECONDS) -> tuple[int, bytes]:
    """Its status and what it wrote; killed after so many seconds."""
    content = b""
    limit = time.monotonic() + seconds
    while select.select([pipe], [], [], max(0.0, limit - time.monotonic()))[0]:
        piece = os.read(pipe, 1 << 16)
        if not piece:
            break
        content += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(pipe)
    return os.waitpid(child, 0)[1], content


def _hung(*_: object) -> NoReturn:
    raise TimeoutError(f"it was not read within {SECONDS} s")


def _watch(place: Path, at_step: Callable[[], None]) -> None:
    """Call this before each change below a folder; until the process ends."""
    below = f"{place}/"

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(below):
            at_step()

    flush = os.fsync

    def fsync(handle: Any) -> None:  # no event of Python's
        at_step()
        flush(handle)

    os.fsync = fsync
    sys.addaudithook(audit)


def _write(write: Write, place: Path, pipe: int, step: int | None, *, by_itself: bool) -> None:
    """Write; say "f" before the first change, "s" at the step, "d" when it is done."""
    count = 0

    def at_step() -> None:
        nonlocal count
        if count == step and by_itself:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == step:
            os.write(pipe, b"s")
        if count == 0:
            os.write(pipe, b"f")
        count += 1

    _watch(place, at_step)
    write.write(place)
    os.write(pipe, b"d")
    if step is None:
        os.write(pipe, str(count).encode())


def _killed(write: Write, place: Path, way: str, step: int, delay: float) -> str:
    """Write and kill; whether that was before the first change, during the write or after it."""
    chosen = None if way == "moment" else step
    child, pipe = _in_child(partial(_write, write, place, step=chosen, by_itself=way == "step"))
    said = b""
    if way == "after":
        while b"s" not in said and (piece := os.read(pipe, 1)):
            said += piece
    if way != "step":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    said += _end(child, pipe)[1]
    return "after" if b"d" in said else "during" if b"f" in said else "before"


def _read(write: Write, place: Path) -> tuple[str, bool]:
    """What there is. Where something was left behind: an hour later the next write removes it."""
    found = write.read(place)
    left = _temporaries(place)
    if left:
        hours_ago = time.time() - 7200
        for path in left:
            os.utime(path, (hours_ago, hours_ago))
        write.write(place)
        assert not _temporaries(place), f"never removed: {_temporaries(place)}"
        again = write.read(place)
        assert again == "new", f"written anew, it is {again}"
    return found, bool(left)


def _temporaries(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if ".tmp-" in path.name or path.name.startswith("deepen-ext-")]


def kill_many(write: Write, kills: int, shared: Path, seed: int) -> dict[str, Any]:
    """Kill so many writes. Returns the counts, and the first errors."""
    rng = random.Random(seed)
    old = shared / write.name / "old"
    old.mkdir(parents=True)
    write.prepare(old.parent)
    write.before(old)
    warm = old.parent / "place"
    shutil.copytree(old, warm, symlinks=True)
    write.write(warm)  # here, so that no child has to import anything
    gc.collect()
    gc.freeze()

    def fresh() -> Path:
        place = shared / write.name / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place, symlinks=True)
        return place

    times, steps = [], 0
    for _ in range(3):
        place = fresh()
        began = time.perf_counter()
        child, pipe = _in_child(partial(_write, write, place, step=None, by_itself=False))
        status, said = _end(child, pipe)
        times.append(time.perf_counter() - began)
        assert status == 0, f"{write.name} fails without a kill"
        steps = int(said[said.index(b"d") + 1 :])
    assert write.read(place) == "new"
    whole = sorted(times)[1]
    when: Counter[str] = Counter()
    found: Counter[str] = Counter()
    left, errors = 0, []
    signal.signal(signal.SIGALRM, _hung)
    for number in range(kills):
        place = fresh()
        way, step = WAYS[number % len(WAYS)], rng.randrange(steps)
        delay = rng.uniform(0, 1.1 * whole if way == "moment" else 2 * whole / steps)
        when[_killed(write, place, way, step, delay)] += 1
        signal.alarm(SECONDS)
        try:
            state, rest = _read(write, place)
            found[state] += 1
            left += rest
        except Exception:
            found["half"] += 1
            errors.append(f"kill {number} ({way}, step {step} of {steps}): {traceback.format_exc()}")
        signal.alarm(0)
    shutil.rmtree(shared / write.name)
    return {
        "kills": kills,
        "steps": steps,
        "ms": round(1e3 * whole, 1),
        "when": dict(when),
        "found": dict(found),
        "left": left,
        "errors": errors[:3],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The counts, a line for each write."""
    moments, states = ("before", "during", "after"), ("old", "new", "part", "rebuilt", "half")
    lines = [("write", "ms", "changes", "kills", *moments, *states, "left behind")]
    for name, one in results.items():
        counts = [one["when"].get(key, 0) for key in moments] + [one["found"].get(key, 0) for key in states]
        lines.append((name, *map(str, (one["ms"], one["steps"], one["kills"], *counts, one["left"]))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" if at else f"{cell:<{width}}" for at, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in lines)
    )


def main() -> NoReturn:
    """Exit code 1 where something was half."""
    # Before they are imported: a child would wait for ever for threads that it does not have.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    from tqdm import tqdm
    from writes import WRITES

    tqdm.monitor_interval = 0  # a thread

    parser = argparse.ArgumentParser(description="kill -9 at random moments of every write of deepen-ext")
    parser.add_argument("--kills", type=int, default=1000, help="of each write")
    parser.add_argument(
        "--write", action="append", choices=list(WRITES), help="this one alone; again for more"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the counts go into this file too")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as shared:
        for name in given.write or WRITES:
            results[name] = kill_many(WRITES[name](), given.kills, Path(shared).resolve(), given.seed)
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    sys.exit(any(one["found"].get("half") for one in results.values()))


if __name__ == "__main__":
    main()
