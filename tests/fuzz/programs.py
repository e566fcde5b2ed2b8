"""The fuzz targets in C++ (tests/fuzz/*.cc): builds them with clang, runs libFuzzer, counts.

libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer    one program for each target
ThreadSanitizer                                            `threads`: threads that share maps
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from embedded_library import ROOT, cmake, ninja
from filelock import FileLock

from deepen_ext.space.relative_map import RelativeMap

# Of the calls asked for, by how much a target has to find and how fast it is.
SHARES = {
    "topk_softmax": 0.15,
    "relative_rows": 0.04,
    "inverse_search": 0.15,
    "fuse": 0.4,
    "embed": 0.2,
    "map_file": 0.06,
}
BUILD = ROOT / "build"
_SECONDS_OF_ONE_INPUT = 20
_ENVIRONMENT = {
    "ASAN_OPTIONS": "quarantine_size_mb=8:malloc_context_size=8",  # the default slows small calls threefold
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass
class Found:
    """What a run of one target came to."""

    target: str
    calls: int
    seconds: float
    inputs: int = 0
    finding: str = ""  # the last lines of what it wrote, and where the input is

    def row(self) -> dict[str, object]:
        """For the results' file."""
        return {
            "target": self.target,
            "calls": self.calls,
            "inputs": self.inputs,
            "seconds": round(self.seconds, 1),
            "finding": self.finding,
        }


def build_calls() -> Path:
    """The folder with a program `fuzz_TARGET` for each target, up to date.

    Raises:
        RuntimeError: there is no clang, or the build fails.
    """
    clang = shutil.which("clang++")
    if clang is None:
        raise RuntimeError("NO clang++ ON PATH, and libFuzzer comes with it; install clang")
    return _build("fuzz-calls", f"-DCMAKE_CXX_COMPILER={clang}", "-DDEEPEN_FUZZ=CALLS")


def build_threads() -> Path:
    """The folder with the program `fuzz_threads`, up to date; by any compiler."""
    return _build("fuzz-threads", "-DDEEPEN_FUZZ=THREADS")


def _build(name: str, *options: str) -> Path:
    build = BUILD / name
    build.mkdir(parents=True, exist_ok=True)
    with FileLock(build / "lock"):
        given = ("-DDEEPEN_PYTHON=OFF", "-DDEEPEN_CUDA=OFF", *options)
        cmake("-S", str(ROOT), "-B", str(build), *ninja(), *given)
        cmake("--build", str(build), "--target", "fuzz_programs")
    return build / "tests" / "fuzz"


def write_seeds(corpus: Path) -> None:
    """What libFuzzer begins with, in a folder for each target: random bytes, and for `map_file` maps that
    `RelativeMap.save` wrote, sparse and dense, in the two forms that map_file.cc takes."""
    chance = random.Random(0)
    for target in SHARES:
        (corpus / target).mkdir(parents=True, exist_ok=True)
        for i in range(40):
            (corpus / target / f"random-{i}").write_bytes(chance.randbytes(chance.randrange(20, 600)))
    torch.manual_seed(0)
    sparse = RelativeMap.from_embedding(torch.randn(5, 4), torch.arange(4), entries=2)
    sparse.fill()
    dense = RelativeMap.from_dense(torch.randn(3, 4).softmax(1))
    for name, one in (("sparse", sparse), ("dense", dense)):
        path = corpus / f"{name}.map"
        one.save(path)
        content = path.read_bytes()
        path.unlink()
        (length,) = struct.unpack("<Q", content[:8])
        head, tensors = content[8 : 8 + length], content[8 + length :]
        (corpus / "map_file" / f"{name}-file").write_bytes(b"\x00" + content)
        (corpus / "map_file" / f"{name}-parts").write_bytes(b"\x01" + head + b"\xff" + tensors)


def fuzz(program: Path, target: str, calls: int, corpus: Path, findings: Path, *, seed: int) -> Found:
    """Run a target until it has made this many calls, or has found something.

    Args:
        program: folder of the programs.
        target: one of `SHARES`.
        calls: how many calls, at least.
        corpus: a folder of inputs, which the run grows.
        findings: a folder, for the input that broke something.
        seed: libFuzzer's, above 0. With the same corpus and seed a run is the same run.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    found = Found(target, 0, 0.0)
    runs = max(calls // 20, 100)  # to learn how many calls an input makes
    while found.calls < calls:
        command = [
            *(str(program / f"fuzz_{target}"), str(corpus), f"-runs={runs}", f"-seed={seed}"),
            *("-max_len=2000", "-entropic=0", "-rss_limit_mb=2048", "-malloc_limit_mb=512"),
            *(f"-timeout={_SECONDS_OF_ONE_INPUT}", f"-artifact_prefix={findings}/{target}-"),
            "-print_final_stats=1",
        ]
        started = time.monotonic()
        done = subprocess.run(command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True)
        found.seconds += time.monotonic() - started
        made = re.search(r"^calls: (\d+)$", done.stderr, re.M)
        if done.returncode or made is None:
            found.finding = done.stderr[-6000:]
            return found
        executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        assert executed is not None, done.stderr[-2000:]
        found.calls += int(made[1])
        found.inputs += int(executed[1])
        runs = max(int(1.02 * (calls - found.calls) * found.inputs / max(found.calls, 1)), 100)
        seed += 1
    return found


def threads(program: Path, rounds: int, *more: str) -> Found:
    """Run threads that share maps under ThreadSanitizer."""
    started = time.monotonic()
    done = subprocess.run(
        [str(program / "fuzz_threads"), str(rounds), *more],
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - started
    steps = re.match(r"(\d+) steps by \d+ threads, 0 wrong", done.stdout)
    if done.returncode or steps is None:
        return Found("threads", 0, seconds, finding=done.stdout + done.stderr[-6000:])
    return Found("threads", int(steps[1]), seconds)
