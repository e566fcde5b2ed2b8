"""Timing on a CUDA device: events, graph replays with a cold and a warm L2 cache, and their figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Figure, percentile, spread

DEVICE = "cuda:0"
REPLAYS, COLD_REPLAYS = 400, 200


def pause() -> None:
    torch.cuda.synchronize()


def bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    times = events(lambda: target.copy_(source), 30)
    return 2 * source.numel() / (statistics.median(times) / 1e6)


def events(
    call: Callable[[], object], repetitions: int, before: Callable[[], object] | None = None
) -> list[float]:
    """Microseconds between an event before and one after each call."""
    pairs = []
    for _ in range(repetitions + 5):
        if before is not None:
            before()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    pause()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairs[5:]]


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def plain(call: Callable[[], object], repetitions: int = 20, calls: int = 20) -> list[float]:
    """Wall clock of one call, in rounds of several that wait for the device at their end."""
    times = []
    for _ in range(repetitions + 2):
        pause()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        pause()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    return times[2:]


@dataclass(frozen=True)
class Baseline:
    """What ours is compared with, timed once for all of ours' ways."""

    name: str
    times: list[float]
    min_ratio: float | None = None  # the budget: how many times ours it must at least take


@dataclass
class Bench:
    """Collects figures until time is up."""

    bytes_a_second: float
    flush: torch.Tensor  # twice the L2 cache
    ends_at: float
    figures: list[dict[str, Any]]
    skipped: list[str]

    def late(self, what: str) -> bool:
        if time.perf_counter() < self.ends_at:
            return False
        self.skipped.append(what)
        return True

    def time(
        self,
        name: str,
        call: Callable[[], object],
        *,
        moved: int,
        equality: str,
        baselines: Sequence[Baseline] = (),
        budget_us: float | None = None,
        note: str = "",
    ) -> None:
        """Cold, warm and plain figures of `call`, which must move at least `moved` bytes."""
        graph = graph_of(call)
        ways = {
            "cold L2": events(graph.replay, COLD_REPLAYS, before=self.flush.zero_),
            "warm L2": events(graph.replay, REPLAYS),
            "plain calls, wall clock": plain(call),
        }
        floor = 1e6 * moved / self.bytes_a_second
        for way, times in ways.items():
            value = statistics.median(times)
            figure = Figure(
                name=f"{name}, {way}",
                value=value,
                unit="µs",
                spread=spread(times),
                repetitions=len(times),
                equality=equality,
                note=note,
                p99=percentile(times, 0.99),
                bytes=moved,
                floor=floor,
                floor_ratio=value / floor,
            )
            if budget_us is not None and "plain" not in way:
                figure = replace(figure, budget=f"at most {budget_us:.3g} µs", met=value <= budget_us)
            for baseline in baselines or (None,):
                self.figures.append(_beside(figure, baseline).as_dict())
            print(f"{figure.name}: {value:.1f} µs, p99 {figure.p99:.1f}, floor {floor:.2f}", flush=True)


def _beside(figure: Figure, baseline: Baseline | None) -> Figure:
    if baseline is None:
        return figure
    theirs = statistics.median(baseline.times)
    ratio = theirs / figure.value
    beside = replace(
        figure,
        baseline=baseline.name,
        baseline_value=theirs,
        baseline_spread=spread(baseline.times),
        baseline_repetitions=len(baseline.times),
        ratio=ratio,
        ratio_of="baseline / ours",
    )
    if baseline.min_ratio is not None and "plain" not in figure.name:
        budget = f"{figure.budget}, " if figure.budget else ""
        beside.budget = f"{budget}at least {baseline.min_ratio:g} times the baseline"
        beside.met = figure.met is not False and ratio >= baseline.min_ratio
    return beside
