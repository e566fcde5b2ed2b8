"""`deepen-ext` as tests call it: in this process, or in one of its own, which takes seconds to start."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepen_ext.commands.cli import app

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "deepen_ext.commands.cli"]


def run(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """The command's exit code, standard output and standard error, from this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # a command sets its own
        done = CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def run_process(*arguments: str, stdin: str = "", **settings: Any) -> subprocess.CompletedProcess[str]:
    """The same from a process of its own, started in the root of the repository."""
    # Without `input`, standard input would be the terminal of whoever runs the tests.
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, cwd=ROOT, check=False, **settings
    )
