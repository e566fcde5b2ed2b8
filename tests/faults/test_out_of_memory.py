"""A member's forward that runs out of memory: caught, named, its caches freed, and the ensemble usable."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_members import NEW, PROMPT, arm, check_free, ensemble_of, failing, members_of
from kills import TESTS

from deepen_ext import Ensemble
from deepen_ext.errors import ModelError
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.members.member import Member

pytestmark = pytest.mark.slow
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS: dict[str, Callable[[], Exception]] = {
    "torch's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the CPU's": lambda: RuntimeError(CPU),
    "Python's": MemoryError,
}
SAID = r"tiny-2: its forward pass ran out of memory \(.*\); take fewer texts at once \(batch_size\)"


@pytest.fixture(scope="module")
def members(one_byte_folders: list[Path]) -> list[Member]:
    return members_of(one_byte_folders)


@pytest.fixture(scope="module")
def ensemble(members: list[Member]) -> Ensemble:
    return ensemble_of(members)


WAYS: dict[str, Callable[[Ensemble], Any]] = {
    "generate": lambda one: one.generate(PROMPT, max_new_tokens=NEW, draft=0).text,
    "drafts": lambda one: one.generate(PROMPT, max_new_tokens=NEW, draft=2).text,
    "batch": lambda one: [t.text for t in one.generate([PROMPT, "x"] * 2, max_new_tokens=NEW, batch_size=2)],
    "stream": lambda one: "".join(one.stream(PROMPT, max_new_tokens=NEW)),
}


@pytest.mark.parametrize(
    ("way", "error"),
    [*(("generate", error) for error in ERRORS), *((way, "torch's") for way in WAYS if way != "generate")],
)
def test_at_every_step(ensemble: Ensemble, members: list[Member], way: str, error: str) -> None:
    with failing(members[1], 10**9, ERRORS[error]) as forwards:
        whole = WAYS[way](ensemble)
    assert forwards[0] >= 2
    for at in range(forwards[0]):
        arm(members)
        with failing(members[1], at, ERRORS[error]), pytest.raises(ModelError, match=SAID):
            WAYS[way](ensemble)
        check_free(members)
    assert WAYS[way](ensemble) == whole


def test_other_failures_are_not_called_so(ensemble: Ensemble, members: list[Member]) -> None:
    with (
        failing(members[1], 1, lambda: RuntimeError("shapes differ")),
        pytest.raises(ModelError, match=r"tiny-2: its forward pass failed: RuntimeError: shapes differ$"),
    ):
        ensemble.generate(PROMPT, max_new_tokens=NEW)


def test_an_evaluation_keeps_what_was_answered(
    ensemble: Ensemble, members: list[Member], tmp_path: Path
) -> None:
    (tmp_path / "data" / "triviaqa").mkdir(parents=True)
    lines = [{"question": f"What is {n} and {n}?", "answer": [str(2 * n)]} for n in range(4)]
    for name, rows in (("test", lines), ("demos", [{"question": "Who?", "answer": "Me"}])):
        file = tmp_path / "data" / "triviaqa" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out: Path) -> list[dict[str, Any]]:
        try:
            evaluate(
                {"x": ensemble}, "triviaqa", tmp_path / "data", out=out, batch_size=1, share_forwards=False
            )
        finally:
            (file,) = out.glob("*.jsonl")
            items = [json.loads(line) for line in file.read_text().splitlines()[1:]]
            found.append([{key: one[key] for key in one if key != "timing"} for one in items])
        return found[-1]

    found: list[list[dict[str, Any]]] = []
    with failing(members[1], 10**9, MemoryError) as forwards:
        whole = run(tmp_path / "whole")
    arm(members)
    with failing(members[1], forwards[0] // 2, MemoryError), pytest.raises(ModelError, match=SAID):
        run(tmp_path / "out")
    check_free(members)
    assert 0 < len(found[-1]) < len(whole)
    assert run(tmp_path / "out") == whole


# The address space is closed over what is used: a long batch then needs more than there is.
REALLY = """
import resource, sys
import torch
from deepen_ext import Ensemble, ModelError, load_members
torch.set_num_threads(1)
ensemble = Ensemble(load_members(sys.argv[1:]), fuser="average", cache=False, boundary_aware=False)
short = ensemble.generate("Once upon", max_new_tokens=4).text
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
try:
    ensemble.generate([chr(97 + n % 26) * 370 for n in range(400)], max_new_tokens=2)
except ModelError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert ensemble.generate("Once upon", max_new_tokens=4).text == short
print("usable")
"""


def test_really(one_byte_folders: list[Path]) -> None:
    """By a limit of the process's address space."""
    assert resource.RLIMIT_AS
    done = subprocess.run(
        [sys.executable, "-c", REALLY, *map(str, one_byte_folders)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, usable = done.stdout.splitlines()
    assert "its forward pass ran out of memory" in said
    assert usable == "usable"
