"""One fusion step beside other work: p50 and p99 while the machine is idle, and beside busy processes.

The demo pair's real logits, one text, `fuser.step` as the loop calls it, with caches that hold other data, as
after the members' forwards. With one thread and with two, by AVX2 and by this processor's best instructions.
A step that waits for a second thread shows here: the second thread has no processor where another process is
busy, and the step ends when the scheduler gives it one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import PROMPTS, ROOT, Figure, environment, percentile, speed_file, spread, write_json

from deepen_ext import Ensemble, _core, demo
from deepen_ext.members.loading import load_members

FLUSHED_MB = 64


def busy(count: int) -> list[subprocess.Popen[bytes]]:
    """Processes that never rest."""
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]


def times(ensemble: Ensemble, logits: list[torch.Tensor], threads: int, rounds: int) -> list[float]:
    """Microseconds of each of `rounds` steps."""
    others = torch.ones(FLUSHED_MB * 250_000)
    ensemble.fuser.step(logits, ensemble.weights)  # its rows are known from here on
    found = []
    for _ in range(rounds):
        torch.set_num_threads(1)  # no other thread that still spins when the step begins
        others.add_(0)
        torch.set_num_threads(threads)
        start = time.perf_counter()
        ensemble.fuser.step(logits, ensemble.weights)
        found.append(1e6 * (time.perf_counter() - start))
    return found


def measure(rounds: int) -> list[Figure]:
    """Every case, its idle p50 and p99 the baseline of the busy ones."""
    members = load_members(demo.members(), backend="transformers")
    logits = []
    for member in members:
        ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROMPTS[0])
        with torch.no_grad():
            logits.append(member.model(torch.tensor([ids])).logits[:, -1].contiguous())
    figures = []
    for recipe in ("bytes", "calibrated"):
        ensemble = Ensemble(members, fuser="deepen", recipe=recipe)
        for isa in dict.fromkeys(("avx2", _core.best_isa())):
            if isa != "portable":
                _core.set_isa(isa)
            for threads in (1, 2):
                figures += _beside(ensemble, logits, threads, rounds, f"{recipe}, {isa}")
        _core.set_isa(_core.best_isa())
    return figures


def _beside(
    ensemble: Ensemble, logits: list[torch.Tensor], threads: int, rounds: int, name: str
) -> list[Figure]:
    found: list[Figure] = []
    for others in (0, 1, 2):
        processes = busy(others)
        try:
            time.sleep(0.5)
            taken = times(ensemble, logits, threads, rounds)
        finally:
            for one in processes:
                one.kill()
                one.wait()
        beside = "idle" if not others else f"beside {others} busy process{'es' if others > 1 else ''}"
        figure = Figure(
            f"fusion step, {name}, {threads} thread{'s' if threads > 1 else ''}, {beside}",
            percentile(taken, 0.5),
            "µs",
            spread(taken),
            rounds,
            p99=percentile(taken, 0.99),
        )
        if found:
            idle = found[0].p99
            assert idle is not None
            assert figure.p99 is not None
            figure.baseline, figure.baseline_value = "p99, idle", idle
            figure.ratio, figure.ratio_of = figure.p99 / idle, "p99 / idle p99"
        found.append(figure)
        print(f"{figure.name}: p50 {figure.value:.0f}, p99 {figure.p99:.0f} µs", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "step_latency")
    options = parser.parse_args()
    if os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":
        # torch's own part of the step by AVX2 throughout; read when torch loads, hence a new process.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})
    found: dict[str, Any] = environment()
    figures = measure(options.rounds)
    target = options.results / speed_file(found)
    write_json(target, {**found, "figures": {"step_latency": [one.as_dict() for one in figures]}})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
