"""`deepen-ext serve` with the demo pair, as a process beside a benchmark."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ROOT


@contextmanager
def server(*options: str, lanes: int) -> Iterator[tuple[str, int]]:
    """Its address and its process id. Where it fails, its log is kept, and named."""
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [sys.executable, "-m", "deepen_ext.commands.cli", "serve", "--demo", "--fuser", "deepen"]
    command += ["--port", "0", "--lanes", str(lanes), *options]
    with log.open("w", encoding="utf-8") as written:
        process = subprocess.Popen(command, stderr=written, cwd=ROOT)
    try:
        while "serves" not in (said := log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {said}")
            time.sleep(0.1)
        line = next(one for one in said.splitlines() if "serves" in one)
        yield line.rsplit(" ", 1)[1], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            print(f"the server's exit code is {process.returncode}; see {log}", file=sys.stderr)
        else:
            log.unlink()
