"""GPU benchmarks: each operation and the whole fusion step, beside the bytes they must move and torch.

Writes RESULTS/<gpu>.json after each case, so that a run that is cut short loses nothing. Every result is
first compared with the CPU twin's; a case that fails is written down, and the others run. Times are of CUDA
events, with the device never waiting for Python: "warm" is a call among 20 in one CUDA graph, "cold" the
replay of a graph of one call after a read of twice the L2; "plain" is the wall clock of ordinary calls in a
row, Python and launches included. Slow baselines come last. What would end after `--minutes` is left out, and
named.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import Figure, check_equal, spread
from demo_rows import FILE as DEMO_ROWS
from gpu_clock import (
    DEVICE,
    Baseline,
    Bench,
    bandwidth,
    events,
    file_stem,
    gpu_environment,
    graph_of,
    in_a_graph,
    pause,
    plain,
)
from safetensors.torch import load_file

from deepen_ext import RelativeMap, _core, ops
from deepen_ext.fusers import DeepenFuser, reference
from deepen_ext.space.row_sources import SimilarityRows
from deepen_ext.space.row_table import RowTable

BATCHES = (1, 8, 32, 128)
PAIRS = {  # vocabularies, shared anchors
    "32k + 32k": (32_000, 32_000, 30_000),
    "49k + 262k": (49_152, 262_144, 46_146),
    "128k + 152k": (128_256, 151_936, 100_000),
}
DIM, K, ENTRIES, STEPS, LEARNING_RATE, MIN_PROBABILITY = 640, 128, 32, 5, 0.15, 1e-4
PAPER_ANCHORS = 4000
REAL = "49k + 262k, the demo pair's real rows"


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


def _torch_topk(logits: torch.Tensor) -> Any:
    return torch.softmax(logits, dim=-1, dtype=torch.float32).topk(K, dim=-1)


def time_topk(bench: Bench, vocab: int, batch: int, dtype: torch.dtype, name: str) -> None:
    logits = _random_logits(batch, vocab, seed=vocab).to(dtype)
    ours, twin = ops.topk_softmax(logits, K), ops.topk_softmax(logits.cpu(), K)
    assert torch.equal(ours.ids.cpu(), twin.ids), "ids differ from the CPU twin's"
    equality = check_equal("same ids, probabilities and the CPU twin's", ours.probs.cpu(), twin.probs, 1e-5)
    moved = _moved_topk(batch, vocab, logits.element_size())
    budget = None
    if vocab == 262_144 and dtype == torch.float32:
        budget = {1: 12.0, 32: 1.5 * 1e6 * moved / bench.bytes_a_second + 10}.get(batch)
    eager = Baseline("torch eager, softmax + topk, in a graph", in_a_graph(lambda: _torch_topk(logits)))
    bench.time(
        name, lambda: ops.topk_softmax(logits, K), moved=moved, equality=equality, baselines=[eager],
        budget_us=budget,
    )  # fmt: skip


def time_compiled_topk(bench: Bench, vocab: int, batch: int, dtype: torch.dtype, name: str) -> None:
    logits = _random_logits(batch, vocab, seed=vocab).to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(_torch_topk, dynamic=False)
    times = in_a_graph(lambda: compiled(logits))
    bench.beside(name, Baseline("torch.compile of softmax + topk, in a graph", times))


def topk_cases() -> list[tuple[int, int, torch.dtype, str]]:
    """The ones with a budget first."""
    shapes = [(vocab, batch) for vocab in (262_144, 151_936, 32_000) for batch in BATCHES]
    shapes.sort(key=lambda one: one[0] != 262_144 or one[1] not in (1, 32))
    cases = [(*one, torch.float32) for one in shapes]
    cases += [(262_144, batch, torch.bfloat16) for batch in (1, 32)]
    return [
        (vocab, batch, dtype,
         f"topk_softmax, V {vocab:,}, k {K}, {str(dtype).removeprefix('torch.')}, B {batch}")
        for vocab, batch, dtype in cases
    ]  # fmt: skip


def time_relative_rows(bench: Bench, count: int, vocab: int, anchors: int, name: str) -> None:
    source = SimilarityRows(_embedding(vocab, seed=1), torch.arange(anchors))
    tokens = torch.arange(anchors - count // 2, anchors - count // 2 + count, device=DEVICE)
    arguments = (tokens, *source.similarity)
    embedding, mean = source.similarity.embedding, source.similarity.mean
    twin = SimilarityRows(embedding.cpu(), torch.arange(anchors)).compute(tokens[:16].cpu())
    found = torch.ops.deepen_ext.relative_rows(*arguments)[1][:16].cpu()
    equality = check_equal("values of 16 rows and the CPU twin's", found, twin.values, 1e-4)
    centred = embedding[source.similarity.anchor_ids].float() - mean
    normal = torch.nn.functional.normalize(centred, dim=1)

    def eager() -> Any:
        query = torch.nn.functional.normalize(embedding[tokens].float() - mean, dim=1)
        return torch.softmax(source.temperature * (query @ normal.T), dim=1).topk(ENTRIES, dim=1)

    bench.time(
        name,
        lambda: torch.ops.deepen_ext.relative_rows(*arguments),
        moved=2 * DIM * (count + anchors) + count * (8 * ENTRIES + 8) + 12 * anchors,
        equality=equality,
        baselines=[Baseline("torch matmul (float32) + softmax + topk, eager", events(eager, 20))],
        note=f"{2e-9 * count * anchors * DIM:.0f} GFLOP of similarity",
    )


class Pair:
    """Two vocabularies with filled maps, here and on the CPU, and what fuses there."""

    def __init__(self, name: str, maps: list[RelativeMap]) -> None:
        self.name, self.maps = name, maps
        self.anchors = maps[0].anchors
        self.vocabs = [one.vocab_size for one in maps]
        self.on_cpu = [one.to("cpu") for one in maps]
        settings = {"learning_rate": LEARNING_RATE, "steps": STEPS, "candidates": K}
        self.fuser = DeepenFuser(maps, min_probability=MIN_PROBABILITY, **settings)
        self.twin = DeepenFuser(self.on_cpu, min_probability=MIN_PROBABILITY, **settings)

    def logits(self, batch: int) -> list[torch.Tensor]:
        return [_random_logits(batch, vocab, seed=i) for i, vocab in enumerate(self.vocabs)]


def random_pair(bench: Bench, name: str) -> Pair:
    *vocabs, anchors = PAIRS[name]
    maps = []
    for i, vocab in enumerate(vocabs):
        relative = RelativeMap.from_embedding(_embedding(vocab, seed=i), torch.arange(anchors))
        pause()
        start = time.perf_counter()
        relative.fill()
        pause()
        taken = 1e3 * (time.perf_counter() - start)
        title = f"filling a map at load, V {vocab:,}, {anchors:,} anchors, d {DIM}, bfloat16"
        bench.keep(Figure(title, taken, "ms", (taken, taken), 1, note="once, wall clock"))
        maps.append(relative)
    return Pair(name, maps)


def real_rows(pair: Pair) -> tuple[Pair, list[torch.Tensor]]:
    """The demo pair's real tokens and their relative rows (demo_rows.py), and logits that put these on top.

    All other rows are the random pair's, and all other logits random.
    """
    stored = load_file(DEMO_ROWS)
    assert int(stored["anchors"]) == pair.anchors, f"{DEMO_ROWS} has other anchors: make it again"
    maps, logits = [], []
    for i, random in enumerate(pair.on_cpu):
        ids = stored[f"ids{i}"].long()
        table = RowTable.empty(random.vocab_size, random.anchors, ENTRIES)
        for part in ("columns", "values", "rest"):
            rows = getattr(table.rows, part)
            rows.copy_(getattr(random.rows, part))
            rows[ids] = stored[f"{part}{i}"].to(rows.dtype)
        table.known[:] = True
        maps.append(RelativeMap(table).to(DEVICE))
        known = stored[f"probs{i}"].log()
        generator = torch.Generator().manual_seed(i)
        below = 2 * torch.randn(len(ids), random.vocab_size, generator=generator).abs() + 0.1
        rest = known.amin(dim=1, keepdim=True) - below
        logits.append(rest.scatter_(1, ids, known).to(DEVICE))
    return Pair(REAL, maps), logits


def _members(tops: list[ops.TopK], maps: list[RelativeMap]) -> list[ops.FuseInput]:
    return [ops.FuseInput(top, one.rows) for top, one in zip(tops, maps, strict=True)]


def _on_cpu(tops: list[ops.TopK]) -> list[ops.TopK]:
    return [ops.TopK(*(one.cpu() for one in top)) for top in tops]


def time_both(bench: Bench, pair: Pair, logits: list[torch.Tensor], name: str) -> None:
    """All members' top-k in one call, beside a call for each."""
    ours = ops.topk_softmax_many(logits, K)
    for one, top in zip(logits, ours, strict=True):
        assert torch.equal(top.ids.cpu(), ops.topk_softmax(one.cpu(), K).ids), (
            "ids differ from the CPU twin's"
        )
    apart = in_a_graph(lambda: [ops.topk_softmax(one, K) for one in logits])
    bench.time(
        name,
        lambda: ops.topk_softmax_many(logits, K),
        moved=sum(_moved_topk(len(one), one.shape[1], one.element_size()) for one in logits),
        equality="the same ids as the CPU twin's",
        baselines=[Baseline("a call for each member, in a graph", apart)],
    )


def time_fuse(bench: Bench, pair: Pair, logits: list[torch.Tensor], name: str) -> None:
    batch = len(logits[0])
    settings = {"learning_rate": LEARNING_RATE, "steps": STEPS, "min_probability": MIN_PROBABILITY}
    tops = [ops.topk_softmax(one, K) for one in logits]
    weights = torch.full((batch, 2), 0.5, device=DEVICE)
    members, here = _members(tops, pair.maps), _members(_on_cpu(tops), pair.on_cpu)
    work = logits[0].clone()
    found = ops.fuse(work, members, weights, **settings)
    twin = ops.fuse(logits[0].cpu(), here, weights.cpu(), **settings)
    _check_choice(found[1], twin[1], work.cpu())
    bench.time(
        name,
        lambda: ops.fuse(work, members, weights, **settings),
        moved=_moved_rows(batch, 2),
        equality=check_equal("same argmax, logits and the CPU twin's", found[0].cpu(), twin[0], 1e-3),
        budget_us={1: 15.0, 32: 40.0}.get(batch) if pair.name == "128k + 152k" else None,
    )


def time_search(bench: Bench, made: Callable[[], Pair], batch: int, name: str) -> None:
    pair = made()
    search = {"learning_rate": LEARNING_RATE, "steps": STEPS}
    top = ops.topk_softmax(pair.logits(batch)[0], K)
    generator = torch.Generator(DEVICE).manual_seed(0)
    target = torch.softmax(3 * torch.randn(batch, pair.anchors, device=DEVICE, generator=generator), dim=1)
    given = (top.probs.log(), top.ids, top.tail.log(), target)
    found = ops.inverse_search(*given, pair.maps[0].rows, **search)
    wanted = ops.inverse_search(*(one.cpu() for one in given), pair.on_cpu[0].rows, **search)
    bench.time(
        name,
        lambda: ops.inverse_search(*given, pair.maps[0].rows, **search),
        moved=batch * K * (12 + 8 * ENTRIES + 4 + 4 * ENTRIES),
        equality=check_equal("logits and the CPU twin's", found.cpu(), wanted, 1e-3),
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


def time_step(bench: Bench, pair: Pair, logits: list[torch.Tensor], name: str) -> None:
    batch = len(logits[0])
    found = pair.fuser.step(logits, [0.5, 0.5])
    twin = pair.twin.step([one.cpu() for one in logits], [0.5, 0.5])
    _check_choice(found.chosen, twin.chosen, found.logits.cpu())
    read = sum(one.numel() for one in logits) * 4
    bench.time(
        name,
        lambda: pair.fuser.step(logits, [0.5, 0.5]),
        moved=read + logits[0].numel() * 4 + _moved_rows(batch, 2),
        equality=check_equal("same tokens, logits and the CPU twin's", found.logits.cpu(), twin.logits, 1e-3),
        budget_us={1: 30.0, 32: 100.0}.get(batch) if pair.name == "128k + 152k" else None,
    )


def time_paper(bench: Bench, made: Callable[[], Pair], anchors: int, name: str) -> None:
    """The paper in torch beside the step of batch 1; by formula and compiled where the matrices are small."""
    pair = made()
    title = f"the paper in torch, dense rows, {anchors:,} anchors"
    matrices = _matrices(pair, anchors)
    if matrices is None:
        size = 4e-9 * anchors * sum(pair.vocabs)
        bench.skipped.append(f"{title}, {pair.name}: its {size:.0f} GB do not fit this card's memory")
        return
    logits = pair.logits(1)

    def paper() -> torch.Tensor:
        return reference.fuse_logits(logits, matrices, [0.5, 0.5], learning_rate=LEARNING_RATE, steps=STEPS)

    check_equal("the paper by formula and by autograd", _dense_step(*logits, *matrices), paper(), 2e-2)
    least = 200 if pair.name == "49k + 262k" and anchors == PAPER_ANCHORS else None
    bench.beside(name, Baseline(f"{title}, autograd, eager, wall clock", plain(paper, 3, 1), least))
    if anchors == PAPER_ANCHORS:
        torch._dynamo.reset()
        compiled = torch.compile(_dense_step, dynamic=False)
        compiled(*logits, *matrices)
        times = plain(lambda: compiled(*logits, *matrices), 5, 2)
        bench.beside(name, Baseline(f"{title}, gradient by formula, torch.compile, wall clock", times))


Given = tuple[Pair, Callable[[int], list[torch.Tensor]]]  # what fuses, and logits of a batch


def run_pair(bench: Bench, title: str, given: Callable[[], Given], batches: Sequence[int]) -> None:
    """The whole step and fuse alone, smallest batch first."""
    shape = f"k {K}, m {ENTRIES}, T {STEPS}"

    def run(what: Callable[[Bench, Pair, list[torch.Tensor], str], None], batch: int, name: str) -> None:
        pair, logits = given()
        what(bench, pair, logits(batch), name)

    for batch in batches:
        for kind, what in (
            ("whole fusion step", time_step),
            ("fuse after top-k", time_fuse),
            ("top-k of both members", time_both),
        ):
            name = f"{kind}, {title}, {shape}, B {batch}"
            bench.case(name, partial(run, what, batch, name))


def run(bench: Bench) -> None:
    """Every case; what has a budget first, slow baselines last."""
    times = events(graph_of(lambda: torch.cuda._sleep(1)).replay, 200)
    title = "a graph of one kernel that does nothing"
    bench.keep(Figure(title, statistics.median(times), "µs", spread(times), len(times)))
    for vocab, batch, dtype, name in topk_cases():
        bench.case(name, partial(time_topk, bench, vocab, batch, dtype, name))
    pair_of = cache(partial(random_pair, bench))

    def random(name: str) -> Given:
        return pair_of(name), pair_of(name).logits

    @cache
    def real() -> Given:
        pair, logits = real_rows(pair_of("49k + 262k"))
        return pair, lambda batch: [one[torch.arange(batch, device=DEVICE) % len(one)] for one in logits]

    for name in reversed(PAIRS):  # the pair of the budgets first
        run_pair(bench, name, partial(random, name), BATCHES)
    run_pair(bench, REAL, real, (1, 32))
    for name in reversed(PAIRS):
        for batch in BATCHES:
            title = f"inverse_search, {name}, k {K}, m {ENTRIES}, T {STEPS}, B {batch}"
            bench.case(title, partial(time_search, bench, partial(pair_of, name), batch, title))
    for count, vocab, anchors in ((128, 262_144, 46_146), (4096, 262_144, 46_146)):
        name = f"relative_rows, {count} tokens, {anchors:,} anchors, d {DIM}, bfloat16"
        bench.case(name, partial(time_relative_rows, bench, count, vocab, anchors, name))
    for vocab, batch, dtype, name in topk_cases():
        if dtype == torch.float32 and batch in (1, 32):
            title = f"torch.compile beside {name}"
            compiled = partial(time_compiled_topk, bench, vocab, batch, dtype, name)
            bench.case(title, compiled, seconds=30, beside=name)
    for name in reversed(PAIRS):
        step = f"whole fusion step, {name}, k {K}, m {ENTRIES}, T {STEPS}, B 1"
        for dense in (PAPER_ANCHORS, PAIRS[name][2]):
            title = f"the paper of {dense:,} anchors beside {step}"
            paper = partial(time_paper, bench, partial(pair_of, name), dense, step)
            bench.case(title, paper, seconds=45, beside=step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing runs that would end after these")
    parser.add_argument("--only", type=re.compile, default="", help="a regular expression: the cases to run")
    options = parser.parse_args()
    if not _core.cuda_compiled() or not torch.cuda.is_available():
        parser.exit(3, "bench/gpu.py needs a CUDA device and a build with the CUDA part (make gpu-build)\n")

    file = options.results / f"{file_stem()}.json"
    if options.only.pattern and file.is_file():
        parser.error(
            f"{file} has the figures of another run, and those of some cases would take their place; name "
            "another folder with --results"
        )
    start = time.perf_counter()
    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # advice on the baselines, many lines each
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = bandwidth()
    card = torch.cuda.get_device_properties(0)
    flush = torch.zeros(card.L2_cache_size // 2, dtype=torch.float32, device=DEVICE)
    ends_at = start + 60 * options.minutes
    bench = Bench(file, gpu_environment(rate), rate, flush, ends_at, options.only)
    print(f"{card.name}: a large copy moves {rate / 1e9:,.0f} GB/s, read and written", flush=True)
    run(bench)
    bench.write()
    print(f"wrote {file}, {time.perf_counter() - start:.0f} s")
    for one in bench.skipped:
        print(f"not measured: {one}")
    missed = list(dict.fromkeys(one.name for one in bench.figures if one.met is False))
    print("over budget: " + "; ".join(missed) if missed else "every budget met")
    if bench.failed:
        parser.exit(1, "failed: " + "\n".join(bench.failed) + "\n")


if __name__ == "__main__":
    main()
