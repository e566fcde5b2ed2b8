"""The time limit and the stop after a lasting CUDA error that tests/gpu run under (tests/gpu/guard.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GPU = Path(__file__).parent / "gpu"

# The device's answers are planted, because this runs without one: `synchronize` raises from then on. So is
# torch, of which the guard needs no more, and which takes each of these processes seconds to import.
TORCH = """
class cuda:
    is_initialized = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)
"""
CONFTEST = """
import pytest, torch
from guard import pytest_runtest_protocol

@pytest.fixture
def spoil():
    def plant(times=99):
        left = [None] * times
        def fail():
            if left:
                left.pop()
                raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand more")
        torch.cuda.synchronize = fail
    return plant
"""


def run(folder: Path, test: str, *arguments: str, seconds: str = "60") -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text(TORCH)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_planted.py").write_text(f"import time\n\n{test}\n\ndef test_after():\n    pass\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", *arguments, str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(GPU), "GPU_TEST_SECONDS": seconds},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    ("workers", "assertion"), [([], "pass"), (["--numprocesses", "1"], "assert False, 'the test itself'")]
)
def test_a_lasting_cuda_error_stops_the_session(tmp_path: Path, workers: list[str], assertion: str) -> None:
    done = run(tmp_path, f"def test_illegal(spoil):\n    spoil()\n    {assertion}", *workers)
    assert done.returncode != 0
    assert (
        "test_illegal left the CUDA device unusable (CUDA error: an illegal memory access was encountered)"
        in (done.stdout)
    )
    assert "test_after" not in done.stdout
    assert ("the test itself" in done.stdout) == (assertion != "pass"), done.stdout


def test_an_error_that_does_not_last_stops_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_once(spoil):\n    spoil(times=1)")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("workers", [[], ["--numprocesses", "1"]])
def test_a_test_past_its_time_ends_the_process_and_is_named(tmp_path: Path, workers: list[str]) -> None:
    done = run(tmp_path, "def test_hangs():\n    time.sleep(90)", *workers, seconds="1")
    assert done.returncode != 0
    assert "Timeout (0:00:01)!" in done.stderr
    assert 'test_planted.py", line 4 in test_hangs' in done.stderr
    if workers:
        assert "crashed while running" in done.stdout
        assert "1 failed, 1 passed" in done.stdout
