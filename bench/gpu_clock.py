"""Timing on a CUDA device: the CPU's own time stays out of the figures, and figures are kept as they come.

A graph of one small operation takes the device less time than Python takes to ask for it. So work is queued
ahead: the device first sleeps until the CPU has asked for a whole round.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import Figure, environment, error_line, percentile, spread, write_json

DEVICE = "cuda:0"
IN_GRAPH = 20  # calls in the graph of a warm figure
ROUND = 50  # timed calls between two sleeps
REPLAYS, COLD_REPLAYS = 100, 200
_SLEEP = 4_000_000  # cycles, 2 ms: longer than the CPU takes to ask for a round


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
    """Microseconds between an event before and one after each call, with the device never waiting for us."""
    pairs = []
    for i in range(repetitions + 5):
        if i % ROUND == 0:
            pause()
            torch.cuda._sleep(_SLEEP)
        if before is not None:
            before()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    pause()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairs[5:]]


def graph_of(call: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """`calls` calls, one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def in_a_graph(call: Callable[[], object]) -> list[float]:
    """Microseconds of a call among IN_GRAPH in one graph, on data that the L2 cache holds if it can."""
    replay = graph_of(call, IN_GRAPH).replay
    return [one / IN_GRAPH for one in events(replay, REPLAYS)]


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


def gpu_environment(bytes_a_second: float) -> dict[str, Any]:
    """`common.environment` with the card in the processor's place."""
    found = environment()
    card = torch.cuda.get_device_properties(0)
    found["machine"]["gpu"] = {
        "name": card.name,
        "multiprocessors": card.multi_processor_count,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "l2_mb": round(card.L2_cache_size / 1e6, 1),
        "bandwidth_gb_s": round(bytes_a_second / 1e9),
        "capability": f"{card.major}.{card.minor}",
    }
    found["versions"]["cuda"] = torch.version.cuda
    return found


def file_stem() -> str:
    """What the files of the card's results begin with."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


@dataclass(frozen=True)
class Baseline:
    """What ours is compared with, timed once for all of ours' ways."""

    name: str
    times: list[float]
    min_ratio: float | None = None  # the budget: how many times ours it must at least take


@dataclass
class Bench:
    """Runs cases until time is up, and writes what there is after each."""

    file: Path
    environment: dict[str, Any]
    bytes_a_second: float
    flush: torch.Tensor  # twice the L2 cache; read, so that no dirty line is written back while we time
    ends_at: float  # of time.perf_counter
    only: str | re.Pattern[str] = ""  # a regular expression: the cases to run
    group: str = "gpu"  # what the file has the figures under
    figures: list[Figure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def case(self, name: str, run: Callable[[], None], seconds: float = 0.0, beside: str = "") -> None:
        """Run it if `seconds` are left; a failure is written down and the next case runs.

        `beside` names the figures that the case times a baseline of. Without them it is left out.

        Raises:
            RuntimeError: the device is lost after a failure; what was measured is on disk.
        """
        if not re.search(self.only, name):
            return
        if time.perf_counter() + seconds > self.ends_at:
            self.skipped.append(name)
            self.write()
            return
        if beside and not self._of(beside):
            self.skipped.append(f"{name}: no figure of ours to stand beside")
            self.write()
            return
        try:
            run()
        except Exception as error:  # of any kind: a card is lent for minutes, and the other cases need them
            self.failed.append(f"{name}: {error_line(error)}")
            print(f"FAILED {self.failed[-1]}", flush=True)
            self.write()
            pause()  # raises again if the device is lost
        self.write()

    def _of(self, name: str) -> list[Figure]:
        """The figures of a case, each way of it."""
        return [one for one in self.figures if one.name.startswith(f"{name}, ")]

    def keep(self, figure: Figure) -> None:
        """Say it, and write it down at once."""
        print(line(figure), flush=True)
        self.figures.append(figure)
        self.write()

    def write(self) -> None:
        figures = {self.group: [one.as_dict() for one in self.figures]}
        found = {**self.environment, "figures": figures, "skipped": self.skipped, "failed": self.failed}
        write_json(self.file, found)

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
        """Figures of `call`, which must move at least `moved` bytes."""
        ways = {
            "warm L2": in_a_graph(call),
            "cold L2": events(graph_of(call).replay, COLD_REPLAYS, before=self.flush.sum),
            "plain calls, wall clock": plain(call),
        }
        floor = 1e6 * moved / self.bytes_a_second
        made = []
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
            made.append(figure)
        print(
            f"{name}: " + ", ".join(f"{value.value:.1f} {way}" for way, value in zip(ways, made, strict=True))
            + f" µs; floor {floor:.2f}",
            flush=True,
        )  # fmt: skip
        self.figures += made
        for baseline in baselines:
            self.beside(name, baseline)

    def beside(self, name: str, baseline: Baseline) -> None:
        """A baseline of figures that are there: the first one stands in them, others beside them."""
        ours = self._of(name)
        own = {one.name: one for one in ours}  # a figure with a baseline keeps it
        for figure in own.values():
            made = _beside(figure, baseline)
            if figure.baseline:
                self.figures.append(made)
            else:
                self.figures[self.figures.index(figure)] = made
        theirs = statistics.median(baseline.times)
        print(f"    {baseline.name}: {theirs:.1f} µs, {theirs / ours[0].value:.1f} times ours", flush=True)


def line(figure: Figure) -> str:
    """What is printed of a figure."""
    return f"{figure.name}: {figure.value:.3f} {figure.unit}" + (f"; {figure.note}" if figure.note else "")


def _beside(figure: Figure, baseline: Baseline) -> Figure:
    theirs = statistics.median(baseline.times)
    ratio = theirs / figure.value
    if figure.baseline:  # the figure with its first baseline has the budget of its own
        figure = replace(figure, budget="", met=None)
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
