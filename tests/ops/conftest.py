"""Every test of an operation runs on every instruction set this processor has; in a process that
test_emulation.py starts, on the emulated CUDA kernels instead: each test in one of three orders of threads
and with one of three numbers of multiprocessors, drawn by its name (emulated_launches.py tries more of both).
"""

from __future__ import annotations

import sys
import zlib

import emulated
import pytest
import torch

from deepen_ext import _core
from deepen_ext.ops import checks

_ISAS = ("portable", "avx2", "avx512")
_HERE = _ISAS[: _ISAS.index(_core.best_isa()) + 1]


class Backend:
    """What the operations of a test run on."""

    def __init__(self, emulator: emulated.Emulator | None) -> None:
        self.emulator = emulator
        # (threads, device, stream) for the core. Emulated device memory is the host's.
        self.packed = (2, -1, 0) if emulator is None else (1, 0, 0)
        # Whether relative_rows is emulated too. Tests of what comes after it want the rows of whole
        # vocabularies: those are the CPU twin's, or they would take minutes.
        self.emulates_rows = emulator is not None

    def size(self, full: int, small: int) -> int:
        """`full`, or `small` where each CUDA thread is emulated and `full` would take many seconds."""
        return full if self.emulator is None else small


@pytest.fixture(params=_HERE if emulated.EMULATOR is None else ["emulated"], autouse=True)
def backend(request, monkeypatch):
    emulator = emulated.EMULATOR
    if emulator is None:
        _core.set_isa(request.param)
        yield Backend(None)
        _core.set_isa(_core.best_isa())
        return
    seed = emulated.SEEDS[zlib.crc32(request.node.name.encode()) % len(emulated.SEEDS)]
    emulator.set_seed(seed)
    emulator.set_multiprocessors((4, 132, 1)[seed])
    backend = Backend(emulator)
    backend.emulates_rows = request.module.__name__ in ("test_relative_rows", "test_threads")
    real = checks.backend_of

    def backend_of(operation, where):
        threads, device, stream = real(operation, where)
        emulates = device == -1 and (operation != "relative_rows" or backend.emulates_rows)
        return backend.packed if emulates else (threads, device, stream)

    for name, module in list(sys.modules.items()):
        if name.startswith("deepen_ext.") and getattr(module, "backend_of", None) is real:
            monkeypatch.setattr(module, "backend_of", backend_of)
    # What torch.empty gives (outputs and workspace) is then NaN, or the largest integer.
    torch.set_deterministic_debug_mode("error")
    yield backend
    torch.set_deterministic_debug_mode("default")
    emulated.LAUNCHED.update(line.split(" grid ")[0] for line in emulator.take_launches())
    emulator.set_max_shared_bytes()
    emulator.set_multiprocessors()
