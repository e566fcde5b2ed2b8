"""What a block of the default fusion step asks for of dynamic shared memory, by the kernels' own launches.

Prints JSON. `measure()` runs this file in a process on emulated kernels (tests/emulated.py), once for each
architecture's limit: the launches are the code's own choice, and nothing is worked out a second time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import emulated  # noqa: E402

# cudaDevAttrMaxSharedMemoryPerBlockOptin in bytes (CUDA C++ programming guide, compute capabilities).
LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}
SAME = {"sm_86": "sm_86, sm_89", "sm_90": "sm_90, sm_100"}  # have the same limit, and are not in the table
VOCABS, ANCHORS, K, ENTRIES = (128_256, 262_144), (45_589, 100_000), 128, 32
LARGEST_K = 512  # looked for up to here


def measure() -> dict[str, Any]:
    """By architecture: `step` (kernel: bytes, by anchors) and `largest_k` whose search fits."""
    core = emulated.core_in(emulated.build())
    done = subprocess.run(
        [sys.executable, __file__], env=emulated.environment(core), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated step failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def launched(lines: list[str]) -> dict[str, int]:
    """Dynamic shared bytes by kernel."""
    found = {}
    for line in lines:
        match = re.match(r"\(?(\w+).* shared (\d+) ", line)
        assert match, line
        found[match[1]] = int(match[2])
    return found


def _rows(vocab: int, anchors: int) -> Any:
    """Relative rows of a real shape: columns that differ within a row, spread over all anchors."""
    import torch

    from deepen_ext.ops import RelativeRows

    step = anchors // ENTRIES
    start = torch.arange(vocab)[:, None] * 7919 % step
    columns = (start + step * torch.arange(ENTRIES)).int()
    values = torch.full((vocab, ENTRIES), 0.9 / ENTRIES)
    return RelativeRows(columns, values, torch.full((vocab,), 0.1), anchors)


def _fuse(tops: list[Any], rows: list[Any], logits: Any) -> None:
    import torch

    from deepen_ext.ops import FuseInput, fuse

    inputs = [FuseInput(top, one) for top, one in zip(tops, rows, strict=True)]
    fuse(logits.clone(), inputs, torch.full((1, len(tops)), 0.5), learning_rate=0.15, min_probability=1e-4)


def _on_the_emulator() -> None:
    """CPU tensors go to the emulated kernels from here on."""
    import deepen_ext.ops  # noqa: F401
    from deepen_ext.ops import checks

    real = checks.backend_of
    for name, module in list(sys.modules.items()):
        if name.startswith("deepen_ext.") and getattr(module, "backend_of", None) is real:
            module.backend_of = lambda operation, device: (1, 0, 0)  # type: ignore[attr-defined]


def _largest_k(fits: Any) -> int:
    low, high = 0, LARGEST_K
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def main() -> None:
    import torch

    from deepen_ext.ops import topk_softmax

    emulator = emulated.EMULATOR
    assert emulator is not None, "call measure()"
    _on_the_emulator()
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(1, vocab, generator=generator) for vocab in VOCABS]
    found: dict[str, Any] = {}
    for name, limit in LIMITS.items():
        emulator.set_max_shared_bytes(limit)
        steps = {}
        for anchors in ANCHORS:
            rows = [_rows(vocab, anchors) for vocab in VOCABS]
            emulator.take_launches()
            tops = [topk_softmax(one, K) for one in logits]
            _fuse(tops, rows, logits[0])
            steps[anchors] = launched(emulator.take_launches())

        def fits(k: int, rows: list[Any] = rows) -> bool:
            small = [one[:, :LARGEST_K].contiguous() for one in logits]
            _fuse([topk_softmax(one, k) for one in small], rows, logits[0])
            return launched(emulator.take_launches())["fuse_kernel"] > 0

        found[name] = {"step": steps, "largest_k": _largest_k(fits)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
