"""A time limit for each test, and an end to the session when a CUDA error has made the device unusable.

Needs pytest alone. A test that waits for a kernel that never ends is stuck inside CUDA, where no signal
reaches Python: the process has to end. Under pytest-xdist that is one worker; another takes its place.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from typing import TextIO

import pytest
import torch

SECONDS = float(os.environ.get("GPU_TEST_SECONDS", "120"))  # a test, with its fixtures

_stderr: TextIO | None = None


def _real_stderr(config: pytest.Config) -> TextIO:
    """What stderr was before pytest's capture: a captured trace would be lost with the process."""
    global _stderr
    if _stderr is None:
        capture = config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            _stderr = os.fdopen(os.dup(2), "w")
    return _stderr


def _lasting_error() -> str | None:
    """What the device says if it says so twice: after an illegal access every later call fails."""
    message = None
    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            message = str(error).strip().splitlines()[0]
        else:
            return None
    return message


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    stderr = _real_stderr(item.config)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=stderr)
    try:
        done = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if torch.cuda.is_initialized() and (error := _lasting_error()):
        left = f"{item.nodeid} left the CUDA device unusable ({error})"
        item.session.shouldfail = f"{left}; no test after it can pass, and none is run"
    return done
