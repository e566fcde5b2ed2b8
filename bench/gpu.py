"""GPU benchmarks: each operation and the whole fusion step, beside the bytes they must move and torch.

Writes bench/results/<gpu>.json. Every result is first compared with the CPU twin's. Times are of CUDA events
around one replay of a CUDA graph: "warm" replays in a row, "cold" ones each after a write of twice the L2;
"plain" is the wall clock of ordinary calls in a row, Python and launches included. What would begin after
`--minutes` is left out, and named.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from common import Figure, check_equal, environment, write_json
from gpu_clock import DEVICE, Baseline, Bench, bandwidth, events, graph_of, pause, plain
from gpu_decode import decode_figures

from deepen_ext import RelativeMap, _core, ops, reference
from deepen_ext.fusers import DeepenFuser
from deepen_ext.row_sources import SimilarityRows

BATCHES = (1, 8, 32, 128)
PAIRS = {  # vocabularies, shared anchors
    "32k + 32k": (32_000, 32_000, 30_000),
    "49k + 262k": (49_152, 262_144, 45_589),
    "128k + 152k": (128_256, 151_936, 100_000),
}
DIM, K, ENTRIES, STEPS, LEARNING_RATE, MIN_PROBABILITY = 640, 128, 32, 5, 0.15, 1e-4
PAPER_ANCHORS = 4000


# --- Inputs ---


def _random_logits(batch: int, vocab: int, seed: int) -> torch.Tensor:
    """A broad bulk, and a few that stand out: float32 [B, V] on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = 2 * torch.randn(batch, vocab, device=DEVICE, generator=generator)
    top = torch.randint(vocab, (batch, 40), device=DEVICE, generator=generator)
    return logits.scatter_(1, top, torch.linspace(14, 6, 40, device=DEVICE).expand(batch, -1))


def _embedding(vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rows = torch.randn(vocab, DIM, device=DEVICE, generator=generator)
    return (rows + 0.6 * torch.randn(DIM, device=DEVICE, generator=generator)).bfloat16()


def _moved_topk(batch: int, vocab: int, size: int) -> int:
    return batch * (vocab * size + K * 8 + 8)


def _moved_rows(batch: int, members: int) -> int:
    """What a fusion step reads of top-k results and relative rows, and writes as new logits."""
    return batch * (members * K * (8 + 8 * ENTRIES + 4) + 3 * K * 4 + 4)


def _check_choice(ours: torch.Tensor, twin: torch.Tensor, logits: torch.Tensor) -> None:
    """The same tokens as the CPU twin's, but for logits that are equal to rounding."""
    heights = [logits.gather(1, one.cpu().long()[:, None]) for one in (ours, twin)]
    assert float((heights[0] - heights[1]).abs().max()) < 1e-3, "the tokens differ from the CPU twin's"


# --- Operations ---


def time_topk(bench: Bench) -> None:
    cases = [(vocab, batch, torch.float32) for vocab in (32_000, 151_936, 262_144) for batch in BATCHES]
    cases += [(262_144, batch, torch.bfloat16) for batch in (1, 32)]
    for vocab, batch, dtype in cases:
        name = f"topk_softmax, V {vocab:,}, k {K}, {str(dtype).removeprefix('torch.')}, B {batch}"
        if bench.late(name):
            continue
        logits = _random_logits(batch, vocab, seed=vocab).to(dtype)
        ours, twin = ops.topk_softmax(logits, K), ops.topk_softmax(logits.cpu(), K)
        assert torch.equal(ours.ids.cpu(), twin.ids), "ids differ from the CPU twin's"
        equality = check_equal(
            "same ids, probabilities and the CPU twin's", ours.probs.cpu(), twin.probs, 1e-5
        )

        def eager(given: torch.Tensor = logits) -> Any:
            return torch.softmax(given, dim=-1, dtype=torch.float32).topk(K, dim=-1)

        baselines = [
            Baseline("torch eager, softmax + topk, a graph's replays", events(graph_of(eager).replay, 100))
        ]
        if dtype == torch.float32 and batch in (1, 32) and not bench.late(f"torch.compile beside {name}"):
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)
            times = events(graph_of(lambda given=logits, run=compiled: run(given)).replay, 100)
            baselines.append(Baseline("torch.compile of softmax + topk, a graph's replays", times))
        moved = _moved_topk(batch, vocab, logits.element_size())
        budget = None
        if vocab == 262_144 and dtype == torch.float32:
            budget = {1: 12.0, 32: 1.5 * 1e6 * moved / bench.bytes_a_second + 10}.get(batch)
        bench.time(
            name, lambda given=logits: ops.topk_softmax(given, K), moved=moved, equality=equality,
            baselines=baselines, budget_us=budget,
        )  # fmt: skip


def time_relative_rows(bench: Bench) -> None:
    for count, vocab, anchors in ((128, 262_144, 45_589), (4096, 262_144, 45_589)):
        name = f"relative_rows, {count} tokens, {anchors:,} anchors, d {DIM}, bfloat16"
        if bench.late(name):
            continue
        source = SimilarityRows(_embedding(vocab, seed=1), torch.arange(anchors))
        tokens = torch.arange(anchors - count // 2, anchors - count // 2 + count, device=DEVICE)
        settings = (source._mean, source.temperature, False, source.entries)
        arguments = (tokens, source.embedding, source.anchor_ids, source._inverse_norm, *settings)
        twin = SimilarityRows(source.embedding.cpu(), torch.arange(anchors)).compute(tokens[:16].cpu())
        found = torch.ops.deepen_ext.relative_rows(*arguments)[1][:16].cpu()
        equality = check_equal("values of 16 rows and the CPU twin's", found, twin.values, 1e-4)
        centred = source.embedding[source.anchor_ids].float() - source._mean
        normal = torch.nn.functional.normalize(centred, dim=1)

        def eager(
            given: SimilarityRows = source, anchor: torch.Tensor = normal, of: torch.Tensor = tokens
        ) -> Any:
            query = torch.nn.functional.normalize(given.embedding[of].float() - given._mean, dim=1)
            return torch.softmax(given.temperature * (query @ anchor.T), dim=1).topk(ENTRIES, dim=1)

        baseline = Baseline("torch matmul (float32) + softmax + topk", events(eager, 20))
        bench.time(
            name,
            lambda given=arguments: torch.ops.deepen_ext.relative_rows(*given),
            moved=2 * DIM * (count + anchors) + count * (8 * ENTRIES + 8) + 12 * anchors,
            equality=equality,
            baselines=[baseline],
            note=f"{2e-9 * count * anchors * DIM:.0f} GFLOP of similarity",
        )


class Pair:
    """Two vocabularies with filled maps, and logits."""

    def __init__(self, name: str, bench: Bench) -> None:
        self.name = name
        *vocabs, self.anchors = PAIRS[name]
        self.maps = []
        for i, vocab in enumerate(vocabs):
            relative = RelativeMap.from_embedding(_embedding(vocab, seed=i), torch.arange(self.anchors))
            pause()
            start = time.perf_counter()
            relative.fill()
            pause()
            seconds = time.perf_counter() - start
            figure = Figure(
                f"filling a map at load, V {vocab:,}, {self.anchors:,} anchors, d {DIM}, bfloat16",
                1e3 * seconds, "ms", (1e3 * seconds, 1e3 * seconds), 1, note="once, wall clock",
            )  # fmt: skip
            bench.figures.append(figure.as_dict())
            print(f"{figure.name}: {figure.value:.0f} ms", flush=True)
            self.maps.append(relative)
        self.vocabs = vocabs
        self.on_cpu = [one.to("cpu") for one in self.maps]
        settings = {"learning_rate": LEARNING_RATE, "steps": STEPS, "candidates": K}
        self.fuser = DeepenFuser(self.maps, min_probability=MIN_PROBABILITY, **settings)
        self.twin = DeepenFuser(self.on_cpu, min_probability=MIN_PROBABILITY, **settings)

    def logits(self, batch: int) -> list[torch.Tensor]:
        return [_random_logits(batch, vocab, seed=i) for i, vocab in enumerate(self.vocabs)]


def time_search_and_fuse(bench: Bench, pair: Pair) -> None:
    search = {"learning_rate": LEARNING_RATE, "steps": STEPS}
    settings = {**search, "min_probability": MIN_PROBABILITY}
    for batch in BATCHES:
        if bench.late(f"inverse_search and fuse, {pair.name}, B {batch}"):
            continue
        logits = pair.logits(batch)
        tops = [ops.topk_softmax(one, K) for one in logits]
        weights = torch.full((batch, 2), 0.5, device=DEVICE)
        members = [ops.FuseInput(top, one.rows) for top, one in zip(tops, pair.maps, strict=True)]
        here = [
            ops.FuseInput(ops.TopK(*(one.cpu() for one in top)), relative.rows)
            for top, relative in zip(tops, pair.on_cpu, strict=True)
        ]
        work = logits[0].clone()
        found = ops.fuse(work, members, weights, **settings)
        twin = ops.fuse(logits[0].cpu(), here, weights.cpu(), **settings)
        _check_choice(found[1], twin[1], work.cpu())
        bench.time(
            f"fuse after top-k, {pair.name}, k {K}, m {ENTRIES}, T {STEPS}, B {batch}",
            lambda given=work, of=members, by=weights: ops.fuse(given, of, by, **settings),
            moved=_moved_rows(batch, 2) + logits[0].numel() * 4,
            equality=check_equal("same argmax, logits and the CPU twin's", found[0].cpu(), twin[0], 1e-3),
            budget_us={1: 15.0, 32: 40.0}.get(batch) if pair.name == "128k + 152k" else None,
        )

        generator = torch.Generator(DEVICE).manual_seed(0)
        target = torch.softmax(
            3 * torch.randn(batch, pair.anchors, device=DEVICE, generator=generator), dim=1
        )
        start, tail = tops[0].probs.log(), tops[0].tail.log()
        given = (start, tops[0].ids, tail, target)
        found_logits = ops.inverse_search(*given, pair.maps[0].rows, **search)
        wanted = ops.inverse_search(*(one.cpu() for one in given), pair.on_cpu[0].rows, **search)
        bench.time(
            f"inverse_search, {pair.name}, k {K}, m {ENTRIES}, T {STEPS}, B {batch}",
            lambda of=given: ops.inverse_search(*of, pair.maps[0].rows, **search),
            moved=batch * K * (12 + 8 * ENTRIES + 4 + 4 * ENTRIES),
            equality=check_equal("logits and the CPU twin's", found_logits.cpu(), wanted, 1e-3),
        )


# --- The whole step ---


def _dense_step(
    main: torch.Tensor, other: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """The paper's step on dense matrices, batched, its gradient by formula: what torch.compile is given."""
    anchors = first.shape[1]
    target = 0.5 * (torch.softmax(main, 1) @ first + torch.softmax(other, 1) @ second)
    z, mean, square = main, torch.zeros_like(main), torch.zeros_like(main)
    lowest = LEARNING_RATE / 4
    for step in range(STEPS):
        angle = math.pi * step / 10
        rate = lowest + (LEARNING_RATE - lowest) * (1 + math.cos(angle)) / 2
        p = torch.softmax(z, 1)
        h = (target / (p @ first)) @ first.T
        gradient = -(p / anchors) * (h - (p * h).sum(1, keepdim=True))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        root = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        z = z * (1 - 0.01 * rate) - rate / (1 - 0.9 ** (step + 1)) * mean / root
    return z


def _matrices(pair: Pair, anchors: int) -> list[torch.Tensor] | None:
    """Dense relative matrices of random rows, or None where they do not fit beside what is there."""
    needed = 4 * anchors * sum(pair.vocabs)
    if needed > 0.8 * torch.cuda.mem_get_info()[0]:
        return None
    made = []
    for vocab in pair.vocabs:
        matrix = torch.empty(vocab, anchors, device=DEVICE)
        for rows in matrix.split(4096):
            rows.copy_(torch.softmax(4 * torch.randn(rows.shape, device=DEVICE), dim=1))
        made.append(matrix)
    return made


def _paper(bench: Bench, pair: Pair, logits: list[torch.Tensor], batch: int, anchors: int) -> list[Baseline]:
    name = f"the paper in torch, dense rows, {anchors:,} anchors"
    if bench.late(f"{name}, {pair.name}, B {batch}"):
        return []
    matrices = _matrices(pair, anchors)
    if matrices is None:
        size = 4e-9 * anchors * sum(pair.vocabs)
        bench.skipped.append(f"{name}, {pair.name}: its {size:.0f} GB do not fit this card's memory")
        return []

    def paper() -> torch.Tensor:
        return reference.fuse_logits(logits, matrices, [0.5, 0.5], learning_rate=LEARNING_RATE, steps=STEPS)

    by_formula = _dense_step(*logits, *matrices)
    check_equal("the paper by formula and by autograd", by_formula, paper(), 2e-2)
    least = 200 if pair.name == "49k + 262k" and anchors == PAPER_ANCHORS else None
    found = [Baseline(f"{name}, autograd, eager", plain(paper, 3, 1), least)]
    if anchors == PAPER_ANCHORS:
        torch._dynamo.reset()
        compiled = torch.compile(_dense_step, dynamic=False)
        compiled(*logits, *matrices)
        found.append(
            Baseline(
                f"{name}, gradient by formula, torch.compile",
                plain(lambda: compiled(*logits, *matrices), 5, 2),
            )
        )
    return found


def time_step(bench: Bench, pair: Pair) -> None:
    for batch in BATCHES:
        shape = f"{pair.anchors:,} anchors, k {K}, m {ENTRIES}, T {STEPS}"
        name = f"whole fusion step, {pair.name}, {shape}, B {batch}"
        if bench.late(name):
            continue
        logits = pair.logits(batch)
        found = pair.fuser.step(logits, [0.5, 0.5])
        twin = pair.twin.step([one.cpu() for one in logits], [0.5, 0.5])
        _check_choice(found.chosen, twin.chosen, found.logits.cpu())
        equality = check_equal(
            "same tokens, logits and the CPU twin's", found.logits.cpu(), twin.logits, 1e-3
        )
        baselines: list[Baseline] = []
        if batch == 1:
            baselines += _paper(bench, pair, logits, batch, PAPER_ANCHORS)
            baselines += _paper(bench, pair, logits, batch, pair.anchors)
            torch.cuda.empty_cache()
        read = sum(one.numel() for one in logits) * 4
        bench.time(
            name,
            lambda of=logits: pair.fuser.step(of, [0.5, 0.5]),
            moved=read + logits[0].numel() * 4 + _moved_rows(batch, 2),
            equality=equality,
            baselines=baselines,
            budget_us={1: 30.0, 32: 100.0}.get(batch) if pair.name == "128k + 152k" else None,
        )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing new after that long")
    options = parser.parse_args()
    if not _core.cuda_compiled() or not torch.cuda.is_available():
        parser.exit(3, "bench/gpu.py needs a CUDA device and a build with the CUDA part (make gpu-build)\n")

    start = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = bandwidth()
    card = torch.cuda.get_device_properties(0)
    flush = torch.empty(2 * card.L2_cache_size, dtype=torch.uint8, device=DEVICE)
    bench = Bench(rate, flush, start + 60 * options.minutes, [], [])
    print(f"{card.name}: a large copy moves {rate / 1e9:,.0f} GB/s, read and written", flush=True)

    for name in reversed(PAIRS):  # the pair of the budgets first
        if not bench.late(f"the pair {name}"):
            pair = Pair(name, bench)
            time_step(bench, pair)
            time_search_and_fuse(bench, pair)
            del pair
            torch.cuda.empty_cache()
    time_topk(bench)
    time_relative_rows(bench)
    if not bench.late("decoding"):
        torch.cuda.empty_cache()
        bench.figures += [one.as_dict() for one in decode_figures(torch.device(DEVICE))]

    target = options.results / f"{re.sub(r'[^a-z0-9]+', '-', card.name.lower()).strip('-')}.json"
    write_json(target, {**gpu_environment(rate), "figures": {"gpu": bench.figures}, "skipped": bench.skipped})
    print(f"wrote {target}, {time.perf_counter() - start:.0f} s")
    for one in bench.skipped:
        print(f"not measured: {one}")
    missed = [one["name"] for one in bench.figures if one.get("met") is False]
    print("over budget: " + "; ".join(missed) if missed else "every budget met")


if __name__ == "__main__":
    main()
