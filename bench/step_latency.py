"""How long one fusion step of the demo pair takes by itself and beside busy processes: p50 and p99, with one
and two threads, on AVX2 and on the processor's best instruction set.

Writes bench/results/step_latency/<machine>.json. One process for each setting, because torch reads its own
instruction set when it starts; each takes its idle and its busy steps in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, TIMED, Figure, environment, machine_name, percentile, spread, write_json

BENCH = Path(__file__).resolve().parent
MOST_OF_IDLE = 2.0  # p99 beside one busy process, of the p99 by itself
MOST_MS = 0.6  # p50 by itself, one thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=BENCH / "results" / "step_latency")
    parser.add_argument("--steps", type=int, default=400, help="timed steps of each setting")
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2], help="numbers of busy processes")
    parser.add_argument("--one", nargs=2, metavar=("ISA", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        isa, threads = options.one
        print(json.dumps(_one(isa, int(threads), options.steps, [0, *options.busy])))
        return

    found = environment()
    best = found["machine"]["isa"]
    figures = []
    for isa in dict.fromkeys(["avx2" if best == "avx512" else best, best]):
        for threads in (1, 2):
            taken = _in_a_process(isa, threads, options)
            figures += _figures(isa, threads, taken)
    for one in figures:
        print(f"{one['name']}: p50 {one['value']:.0f} µs, p99 {one['p99']:.0f} µs  {one.get('budget', '')}")
    target = options.results / f"{machine_name(found)}.json"
    write_json(target, {**found, "figures": figures})
    print(f"wrote {target}")
    missed = [one["name"] for one in figures if one.get("met") is False]
    if missed:
        print("over budget: " + "; ".join(missed))


def _in_a_process(isa: str, threads: int, options: argparse.Namespace) -> dict[int, list[float]]:
    capability = {"avx2": "avx2", "avx512": "avx512", "portable": "default"}[isa]
    command = [sys.executable, __file__, "--one", isa, str(threads), "--steps", str(options.steps)]
    command += ["--busy", *map(str, options.busy)]
    settings = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
    )
    return {int(busy): times for busy, times in json.loads(done.stdout.splitlines()[-1]).items()}


def _figures(isa: str, threads: int, taken: dict[int, list[float]]) -> list[dict[str, Any]]:
    idle = percentile(taken[0], 0.99)
    figures = []
    for busy, seconds in taken.items():
        micro = [1e6 * one for one in seconds]
        figure = Figure(
            name=f"fusion step, demo pair, B 1, {isa}, {threads} threads, {busy} busy processes",
            value=percentile(micro, 0.5),
            unit="µs",
            spread=spread(micro),
            repetitions=len(micro),
            p99=percentile(micro, 0.99),
            note="warm rows; a pass over 32 MB before each step, as a model's forward pass has",
        )
        if busy == 0 and threads == 1:
            figure.budget = f"p50 at most {MOST_MS} ms"
            figure.met = figure.value <= 1000 * MOST_MS
        if busy == 1:
            figure.baseline, figure.baseline_value = "p99 by itself", 1e6 * idle
            figure.ratio, figure.ratio_of = figure.p99 / (1e6 * idle), "p99 beside a busy process / by itself"
            figure.budget = f"p99 at most {MOST_OF_IDLE:g} times that by itself"
            figure.met = figure.ratio <= MOST_OF_IDLE
        figures.append(figure.as_dict())
    return figures


def _one(isa: str, threads: int, steps: int, loads: list[int]) -> dict[int, list[float]]:
    """Seconds of each step, by the number of busy processes beside it."""
    import torch
    from common import PROMPTS

    from deepen_ext import Ensemble, _core, demo
    from deepen_ext.models import load_member
    from deepen_ext.session import BatchSession

    torch.set_num_threads(threads)
    _core.set_isa(isa)
    pair = [load_member(path) for path in demo.members()]
    ensemble = Ensemble(pair, cache=False, **TIMED)
    given: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    for member in pair:
        session_of = [member.vocabulary.prefix_ids + member.vocabulary.encode(one) for one in PROMPTS]
        for own, ids in zip(given, session_of, strict=True):
            own.append(BatchSession(member).sync({0: ids}).clone())
    for own in given:
        ensemble.fuser.step(own, ensemble.weights)  # every row that the timed steps need is known

    others = torch.zeros(8_000_000)
    taken: dict[int, list[float]] = {load: [] for load in loads}
    rounds = 4
    for _ in range(rounds):
        for load in loads:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
            try:
                time.sleep(0.2 if load else 0.0)
                for i in range(steps // rounds):
                    others.sum()
                    start = time.perf_counter()
                    ensemble.fuser.step(given[i % len(given)], ensemble.weights)
                    taken[load].append(time.perf_counter() - start)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    return taken


if __name__ == "__main__":
    main()
