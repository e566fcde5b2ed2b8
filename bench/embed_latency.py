"""Latency of a step of libdeepen, with the demo pair's maps and random logits, beside the same from Python.

    OMP_NUM_THREADS=1 python bench/embed_latency.py                  a million steps: minutes on an idle core
    OMP_NUM_THREADS=1 python bench/embed_latency.py --steps 1000     a try
    OMP_NUM_THREADS=1 python bench/embed_latency.py --sizes 1000     by vocabularies, candidates, dtypes

From Python a hundredth of the steps is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, percentile, speed_file, write_json

from deepen_ext import Ensemble, demo, ops

sys.path.insert(0, str(ROOT / "tests"))
from embedded_library import build_against, install


def from_python(ensemble: Ensemble, steps: int) -> list[float]:
    """Microseconds of `topk_softmax_many` and `fuse` on tensors that are there."""
    torch.manual_seed(0)
    maps = ensemble.fuser.maps  # type: ignore[attr-defined]
    rows = [3 * torch.randn(16, one.vocab_size) for one in maps]
    weights = torch.tensor([[0.5, 0.5]])
    times = []
    for step in range(-100, steps):
        at = slice(step % 16, step % 16 + 1)
        logits = [rows[0][at].clone(), rows[1][at]]
        began = time.perf_counter()
        topk = ops.topk_softmax_many(logits, 128)
        members = [ops.FuseInput(one, own.rows) for one, own in zip(topk, maps, strict=True)]
        ops.fuse(logits[0], members, weights, learning_rate=0.15, min_probability=1e-4)
        if step >= 0:
            times.append(1e6 * (time.perf_counter() - began))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "embed_latency")
    parser.add_argument("--sizes", type=int, metavar="STEPS", help="so many steps of each of many settings")
    options = parser.parse_args()
    found: dict[str, Any] = environment() | {"kind": "embed_latency"}
    if options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            program = build_against(install("-DDEEPEN_CUDA=OFF"), ROOT / "bench" / "embed", Path(folder))
            command = [program / "sizes", str(options.sizes)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout, end="")
        found["sizes"] = json.loads(done.stdout)
        write_json(options.results / f"sizes-{speed_file(found)}", found)
        return
    ensemble = Ensemble.from_pretrained(demo.members(), fuser="deepen")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, one in enumerate(ensemble.fuser.maps):  # type: ignore[attr-defined]
            one.fill()
            paths.append(Path(folder, f"{i}.map"))
            one.save(paths[-1])
        program = build_against(install("-DDEEPEN_CUDA=OFF"), ROOT / "bench" / "embed", Path(folder, "build"))
        command = [program / "latency", *paths, str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found["libdeepen"] = json.loads(done.stdout)
    times = from_python(ensemble, max(options.steps // 100, 100))
    found["python"] = {
        "steps": len(times),
        "us": {
            name: round(percentile(times, share), 1)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
        },
    }
    print(found["libdeepen"], found["python"], sep="\n")
    write_json(options.results / speed_file(found), found)


if __name__ == "__main__":
    main()
