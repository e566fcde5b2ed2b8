"""A time model of the CUDA kernels: what the counts of gpu_counts.py and a card's figures say they take.

Writes the table of docs/gpu.md, beside what bench/gpu.py measured where bench/results/ has that card. A
kernel takes the largest of: its bytes at the memory's rate, those from L2 at the L2's, its tensor products,
and its blocks' chain of dependent events times the waves of blocks. Nothing here is fitted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import gpu_counts
from gpu_counts import Kernel, Step
from marked import write_marked

BENCH = Path(__file__).resolve().parent
BATCHES = (1, 8, 32, 128)

# Cycles until the next dependent instruction can begin. Shared memory, L2 and memory: of the order that
# microbenchmarks of the A100 and the H100 give (arXiv 2402.13499), memory with a miss of the address cache.
# The others are assumed.
CYCLES = {
    "load": 1050,  # an input, cold: from memory, 0.6 µs on an H100
    "l2": 440,  # written by a kernel just before, or an input when warm: 0.25 µs
    "store": 440,  # the last store, until the block counts as ended
    "shared": 29,
    "atomic": 60,  # in shared memory, without contention
    "conflict": 7 * 2,  # more for a load that meets a bank eight times
    "shuffle": 25,
    "barrier": 30,  # of 512 threads that arrive together
    "special": 40,  # exponential, logarithm, root, division
    "tensor": 33,  # mma m16n8k8 in tf32
    "cycle": 1,  # instructions that fill all four schedulers
}
BETWEEN_US = 1.0  # a kernel's end to the next one's first instruction in a CUDA graph: assumed
MMA_SHARE = 0.6  # of the tensor cores' rate that mma.sync without TMA reaches: assumed


@dataclass(frozen=True)
class Card:
    """A card's figures by its maker's data sheet; `memory_tb_s` is what a copy reaches, some 90 % of that."""

    name: str
    multiprocessors: int
    clock_ghz: float
    memory_tb_s: float
    l2_mb: float
    l2_tb_s: float
    tf32_tflops: float


CARDS = {
    "H200": Card("H200", 132, 1.98, 4.2, 60, 5.5, 495),  # clock and memory as measured
    "H100": Card("H100 SXM", 132, 1.755, 3.0, 50, 5.5, 495),
    "A100": Card("A100 SXM 80 GB", 108, 1.41, 1.8, 40, 4.0, 156),
    "4090": Card("RTX 4090", 128, 2.52, 0.92, 72, 4.0, 83),
}


def step_us(step: Step, card: Card, *, cold: bool) -> float:
    cycles = sum(
        count * CYCLES["l2" if kind == "load" and not cold else kind] for kind, count in step.counts.items()
    )
    return cycles / (1e3 * card.clock_ghz)


def parts_us(kernel: Kernel, card: Card, *, cold: bool) -> dict[str, float]:
    """What could set the kernel's time; the largest does."""
    waves = ceil(kernel.blocks / (kernel.resident * card.multiprocessors))
    warm = not cold and kernel.bytes <= 1e6 * card.l2_mb
    return {
        "bytes": kernel.bytes / (1e6 * (card.l2_tb_s if warm else card.memory_tb_s)),
        "L2": kernel.l2_bytes / (1e6 * card.l2_tb_s),
        "tensor cores": kernel.tensor_flop / (1e6 * card.tf32_tflops * MMA_SHARE),
        "latency": waves * sum(step_us(step, card, cold=cold) for step in kernel.chain),
    }


def estimate_us(kernels: list[Kernel], card: Card, *, cold: bool) -> tuple[float, str]:
    """Microseconds of the launches in a graph, and what sets the time of the longest."""
    parts = [parts_us(kernel, card, cold=cold) for kernel in kernels]
    longest = max(parts, key=lambda one: max(one.values()))
    reason = max(longest, key=lambda one: longest[one])
    return sum(max(one.values()) + BETWEEN_US for one in parts), reason


def cases(card: Card) -> list[tuple[str, list[Kernel]]]:
    """Names as bench/gpu.py has them."""
    many = card.multiprocessors
    fused: dict[str, Callable[[int], list[Kernel]]] = {
        "fuse after top-k": gpu_counts.fuse,
        "inverse_search": gpu_counts.inverse_search,
    }
    found = [
        (f"topk_softmax, V {vocab:,}, k 128, float32, B {batch}", gpu_counts.topk_softmax(vocab, batch, many))
        for vocab in (262_144, 151_936, 32_000)
        for batch in BATCHES
    ]
    found += [
        (f"{name}, 128k + 152k, k 128, m 32, T 5, B {batch}", kernels(batch))
        for name, kernels in fused.items()
        for batch in BATCHES
    ]
    return found + [
        (
            f"relative_rows, {tokens} tokens, 46,146 anchors, d 640, bfloat16",
            gpu_counts.relative_rows(tokens, 46_146, many),
        )
        for tokens in (*BATCHES, 4096)
    ]


def measured(results: Path, card: str) -> dict[str, tuple[float, str]]:
    """Microseconds and their commit by name, of that card's files; none where there is no file."""
    found: dict[str, tuple[float, str]] = {}
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if card not in content.get("machine", {}).get("gpu", {}).get("name", ""):
            continue
        figures = [one for group in content["figures"].values() for one in group]
        commit = content["commit"][:10]
        found |= {one["name"]: (one["value"], commit) for one in figures if one["unit"] == "µs"}
    return found


def _beside(estimate: float, value: tuple[float, str] | None) -> str:
    return f"{estimate:.1f} | " + ("" if value is None else f"{value[0]:.1f}, {value[0] / estimate:.1f} ×")


def table(card: Card, found: dict[str, tuple[float, str]]) -> str:
    commits = " and ".join(dict.fromkeys(commit for _, commit in found.values()))
    files = f"measured at {commits}, and its ratio to the model" if found else "nothing measured yet"
    lines = [
        f"**{card.name}**, microseconds in a CUDA graph; {files}.",
        "",
        "| what | MB | warm L2: model | measured | cold L2: model | measured | set by, cold |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, kernels in cases(card):
        moved = sum(kernel.bytes for kernel in kernels) / 1e6
        warm, cold = (estimate_us(kernels, card, cold=one) for one in (False, True))
        lines.append(
            f"| {name} | {moved:,.2f} | {_beside(warm[0], found.get(f'{name}, warm L2'))} "
            f"| {_beside(cold[0], found.get(f'{name}, cold L2'))} | {cold[1]} |"
        )
    return "\n".join(lines)


def chains(card: Card) -> str:
    """Where one row's time goes."""
    lines = ["| kernel, B 1 | step | warm, µs | cold, µs |", "| --- | --- | --- | --- |"]
    for kernel in [*gpu_counts.topk_softmax(262_144, 1, card.multiprocessors), *gpu_counts.fuse(1)]:
        for step in kernel.chain:
            warm, cold = (step_us(step, card, cold=one) for one in (False, True))
            lines.append(f"| `{kernel.name}` | {step.what} | {warm:.2f} | {cold:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--card", choices=CARDS, help="print its table; without, write the H200's into the page"
    )
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--page", type=Path, default=BENCH.parent / "docs" / "gpu.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()
    name = options.card or "H200"
    text = f"{table(CARDS[name], measured(options.results, name))}\n\n{chains(CARDS[name])}"
    if options.card:
        print(text)
    else:
        write_marked(options.page, "model", text, check=options.check)


if __name__ == "__main__":
    main()
