"""What the CUDA kernels do one after the other, counted from their code: the input of gpu_model.py.

A step is what a block cannot overlap with what comes before: dependent loads, barriers, shuffles. Counts are
of its slowest warp at k 128, m 32, T 5, 512 threads a block. They follow the code; those of
fuse and inverse_search are of the kernels before 2026-11-26, whose blocks had 512 threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

K, ENTRIES, STEPS, DIM = 128, 32, 5, 640
THREADS, CHUNK, MOST_SPLITS = 512, 4096, 64  # kSelectThreads, chunk_of(float32), kMaxSplits
Counts = Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """Part of a block's chain: how many dependent events of each kind (gpu_model.CYCLES)."""

    what: str
    counts: Counts


@dataclass(frozen=True)
class Kernel:
    """One launch: its blocks, what they read and write of memory, their chain."""

    name: str
    blocks: int
    resident: int  # blocks that a multiprocessor holds
    bytes: float  # inputs and outputs, each once
    chain: list[Step]
    l2_bytes: float = 0.0  # read from L2, beyond what comes from memory
    tensor_flop: float = 0.0  # on tensor cores, in tf32


def total(*parts: Counts, times: float = 1) -> Counts:
    summed: Counter[str] = Counter()
    for part in parts:
        for kind, count in part.items():
            summed[kind] += times * count  # type: ignore[assignment]  # a Counter adds any number
    return summed


def block_reduce(words: int = 1) -> Counts:
    """Two warp reductions of five shuffles, two barriers (core/block_reduce.cuh)."""
    return {"shuffle": 10 * words, "barrier": 2, "shared": 2}


# Some 1.1 k keys come to the end; each of 512 threads compares its share: four instructions a comparison.
RANK_SORT: Counts = {"cycle": (1.1 * K) ** 2 / 32 * 4 / 4, "shuffle": 1, "barrier": 2, "shared": 4}
COMBINE = total(block_reduce(), block_reduce(), {"special": 1})


# combine_warp: a reduction of integers, taken for a shuffle, then five shuffles.
COMBINE_WARP: Counts = {"shuffle": 6, "special": 1, "shared": 1}
# append, if any lane has a key: a scan of five shuffles, one atomic for the warp, its place to all lanes.
APPEND: Counts = {"shuffle": 6, "atomic": 1, "shared": 1, "cycle": 40}
# find_bar: 32 comparisons a lane of 16 warps, then the lowest of the warps' bars.
FIND_BAR: Counts = {"shared": 4, "barrier": 1, "cycle": 16 * 32 * 2 / 4}


def topk_softmax(vocab: int, batch: int, multiprocessors: int, size: int = 4) -> list[Kernel]:
    """topk_slices and topk_merge; `size` bytes a logit."""
    blocks, chunk = 2 * multiprocessors, CHUNK * 4 // size
    splits = min(max(blocks // batch, 1), ceil(vocab / chunk), MOST_SPLITS)
    rounds = ceil(vocab / splits / chunk)
    on_one = min(2, ceil(batch * splits / multiprocessors))
    instructions = 14  # of a logit: load, unpack, maximum, exponential, sum, comparison with the bar
    stream = {"cycle": on_one * chunk / 32 * instructions / 4, "barrier": 1, "shared": 1}
    handed_on, heads = 2 * K, 54  # keys, on random logits
    slices = [
        Step("first logits", {"load": 1, "cycle": 100}),
        Step("streaming", total(stream, times=rounds)),
        Step("bars", total(FIND_BAR, times=rounds.bit_length())),  # after 1, 2, 4, 8 rounds
        Step("keys into the list", total(APPEND, times=rounds.bit_length())),
        Step("keys handed on", {"shared": 2, "atomic": 2, "shuffle": 2, "barrier": 1}),
        Step("statistics, store", total(COMBINE_WARP, COMBINE_WARP, {"store": 1})),
    ]
    moved = batch * vocab * size
    first = Kernel("topk_slices", batch * splits, 2, moved + batch * splits * handed_on * 8, slices)
    if splits == 1:
        return [first]
    merge = [
        Step("samples, what slices say of themselves", {"l2": 1, "barrier": 1}),
        # The lists' heads come meanwhile, a second dependent load.
        Step("bar, heads", {"l2": 1, "shuffle": 7, "barrier": 3, "shared": 4, "atomic": 1}),
        Step("candidates", total(APPEND, {"barrier": 2, "shared": 2})),
        Step("sorting them", RANK_SORT),
        Step("probabilities, store", total(block_reduce(), {"special": 2, "store": 1})),
    ]
    return [first, Kernel("topk_merge", batch, 1, batch * K * 8, merge, l2_bytes=batch * splits * heads * 8)]


def _search_chain(touched: int) -> list[Step]:
    """group_entries and the search, of an anchor index with `touched` anchors."""
    rows, own = K // 16, ceil(touched / THREADS)  # candidates of a warp, anchors of a thread
    group = total(
        {"cycle": (4 * touched / 32 + touched / 32)},  # clearing
        total({"shared": 2, "atomic": 1}, times=rows),
        total({"shared": 3, "cycle": 40}, times=rows),
        total({"shared": 2, "cycle": 30}, times=own),
        total({"shared": 2, "conflict": 2}, times=own),
        {"shuffle": 15, "shared": 1},
        total({"shared": 3}, times=rows),
        {"barrier": 6},
    )
    step = total(
        {"shared": 2, "shuffle": 10, "barrier": 1},  # largest logit
        {"special": 2, "shuffle": 10, "barrier": 1, "shared": 2},  # exponentials and their sum
        total({"shared": 3, "special": 1}, times=own),  # r and target / r by anchor
        {"barrier": 1, "shuffle": 12},  # h: four lanes a candidate, eight entries each, in flight by fours
        total({"shared": 2}, times=ENTRIES // 4 // 4),
        {"shuffle": 10, "barrier": 1, "shared": 2},
        {"special": 4, "shared": 4},  # AdamW
    )
    return [
        Step("grouping by anchor", group),
        Step(f"search, {STEPS} iterations", total(step, times=STEPS)),
    ]


def _number_anchors() -> Step:
    rows, each = K // 16, ceil(K * (ENTRIES + 4) / THREADS)
    return Step(
        "candidates' rows, numbering",
        total(
            {"cycle": (2 * 2 * K * ENTRIES + K * (ENTRIES + 4)) / 32, "barrier": 4},  # clearing
            {"load": 1},
            total({"atomic": 2, "cycle": 60}, times=rows),
            total({"shared": 2, "cycle": 10}, times=each),
            {"shuffle": 15, "shared": 1},
            total({"shared": 1, "cycle": 10}, times=each),
            total({"shared": 2}, times=each),
        ),
    )


def fuse(batch: int, touched: int = K * ENTRIES, members: int = 2) -> list[Kernel]:
    """fuse_kernel. `touched`: anchors that the candidates name; those of random rows nearly all differ."""
    rows, own = K // 16, ceil(touched / THREADS)
    mass = total({"shared": 2, "atomic": 2, "cycle": 20}, times=rows)
    assistant = total({"l2": 1, "load": 1}, total({"shared": 3, "atomic": 2, "cycle": 30}, times=rows))
    chain = [
        Step("top-k, logits", {"l2": 2, "load": 1, "special": 2, "shuffle": 10, "barrier": 1}),
        _number_anchors(),
        Step("target", total(
            {"cycle": 2 * touched / 32, "barrier": 3}, mass, total(assistant, times=members - 1),
            {"shuffle": 10, "shared": 1}, total({"shared": 2, "cycle": 30}, times=own),
        )),
        *_search_chain(touched),
        Step("logits, argmax", total({"store": 1, "special": 1}, block_reduce(words=2))),
    ]  # fmt: skip
    moved = batch * (members * K * (8 + 8 * ENTRIES + 4) + 3 * K * 4)
    return [Kernel("fuse_kernel", batch, 1, moved, chain)]


def inverse_search(batch: int, touched: int = K * ENTRIES) -> list[Kernel]:
    """inverse_search_kernel: the target is gathered by slot of the hash table, one load after the other."""
    slots = 2 * K * ENTRIES / THREADS
    chain = [
        Step("candidates", {"load": 1, "barrier": 1}),
        _number_anchors(),
        Step("target", total({"shared": 2, "load": 1}, times=slots)),
        Step("its sum", total(block_reduce(words=2), {"shared": ceil(touched / THREADS), "barrier": 1})),
        *_search_chain(touched),
        Step("logits", {"store": 1}),
    ]
    moved = batch * K * (12 + 8 * ENTRIES + 4 + 4 * ENTRIES)
    return [Kernel("inverse_search_kernel", batch, 1, moved, chain)]


def relative_rows(tokens: int, anchors: int, multiprocessors: int) -> list[Kernel]:
    """prepare_queries, score_strips and merge_strips, an embedding of 640 columns of 16 bits."""
    block, resident = (64, 2) if tokens > 16 else (16, 3)
    tiles, groups = ceil(anchors / 128), ceil(tokens / block)
    strips = min(max(resident * multiprocessors // groups, 1), tiles)
    product = total({"barrier": 1, "shared": 2, "tensor": 4}, times=DIM // 16)
    chosen = total({"shared": 8, "shuffle": 10, "special": 4, "cycle": 40}, times=block // 8)
    prepare = [Step("query", total({"load": 2, "special": 2}, block_reduce(words=2), block_reduce(words=2)))]
    strip = [Step("tiles", total({"load": 1}, product, chosen, times=ceil(tiles / strips)))]
    merge = [
        Step("statistics", total({"l2": ceil(tiles / 256), "special": 2}, block_reduce(), block_reduce())),
        Step("lists", total({"l2": 1, "shuffle": 10, "cycle": 100}, times=ceil(strips / 32))),
        Step("one list, results", total({"shared": 20, "shuffle": 40, "barrier": 2, "store": 1}, COMBINE)),
    ]
    embedding, queries = anchors * DIM * 2, tiles * block * DIM * 4
    lists = tokens * strips * ENTRIES * 8
    return [
        Kernel("prepare_queries", tokens, 8, tokens * DIM * 6, prepare),
        Kernel(
            "score_strips", groups * strips, resident, embedding, strip,
            l2_bytes=groups * (embedding + queries), tensor_flop=2 * 2 * groups * block * anchors * DIM,
        ),
        Kernel("merge_strips", tokens, 8, tokens * 8 * ENTRIES, merge, l2_bytes=lists),
    ]  # fmt: skip
