"""The steps of `make gpu`, with programs that only say something, fail or take too long."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "test", "test-sessions", "sanitize", "bench", "decode", "profile")
PROGRAMS = ("python", "compute-sanitizer", "ncu")


def make(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    there = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    if path is not None:
        there["PATH"] = f"{path}:{there['PATH']}"
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(("does", "code"), [("echo said", 0), ("echo said; exit 7", 2), ("sleep 60", 2)])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_fails_where_its_program_does(tmp_path: Path, step: str, does: str, code: int) -> None:
    """Through the pipe into its log, and when its time is up."""
    for name in PROGRAMS:
        (tmp_path / name).write_text(f"#!/bin/sh\n[ $1 = -c ] && exit 0\n{does}\n")
        (tmp_path / name).chmod(0o755)
    results, seconds = tmp_path / "results", "0.3" if "sleep" in does else "60"
    settings = (f"PYTHON={tmp_path / 'python'}", f"GPU_RESULTS={results}", f"GPU_SECONDS={seconds}")
    done = make(f"gpu-{step}", *settings, path=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    logs = [file.read_text() for file in results.glob(f"gpu-{step}*.log")]
    assert logs == ["" if "sleep" in does else "said\n"] * (2 if step == "sanitize" else 1)


def test_all_steps_are_taken() -> None:
    said = make("-n", "gpu").stdout
    assert all(f"gpu-{step}" in said for step in STEPS)
