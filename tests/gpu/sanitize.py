"""A short list of calls for compute-sanitizer, which makes each some hundred times slower.

Every kernel once or twice, at sizes that reach its edges. Results are compared with the CPU twin: a sanitizer
sees no wrong sum. `PYTORCH_NO_CUDA_MEMORY_CACHING=1` gives each tensor an allocation of its own, so that a
write past its end is one past the allocation's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "ops"),
]

from oracle import random_embedding, random_logits  # noqa: E402
from test_gpu_step import random_map, step_on  # noqa: E402

from deepen_ext.ops import inverse_search, topk_softmax, topk_softmax_many  # noqa: E402
from deepen_ext.space.row_sources import SimilarityRows  # noqa: E402

DEVICE = "cuda:0"


def topk() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch, vocab, k in ((2, 33_003, 128), (3, 17, 17), (1, 9000, 5000), (1, 1, 1)):
            logits = random_logits(batch, vocab, seed=k) if vocab > 6 else torch.randn(batch, vocab)
            logits = logits.to(dtype)
            assert torch.equal(topk_softmax(logits.to(DEVICE), k).ids.cpu(), topk_softmax(logits, k).ids)

    pair = [random_logits(2, 33_003, seed=0), random_logits(3, 9000, seed=1).bfloat16()]
    pair[0][:, 5000:9000] += 12  # more than k of the largest in one slice
    for one, given in zip(topk_softmax_many([one.to(DEVICE) for one in pair], 128), pair, strict=True):
        assert torch.equal(one.ids.cpu(), topk_softmax(given, 128).ids)


def rows() -> None:
    for dtype, dim, anchors, entries in (
        (torch.float32, 37, 301, 32),
        (torch.bfloat16, 64, 513, 7),
        (torch.float16, 5, 16, 16),
        (torch.float32, 5, 290, 270),
    ):
        embedding = random_embedding(700, dim, seed=dim).to(dtype)
        tokens = torch.arange(67)
        ids = torch.arange(anchors)
        want = SimilarityRows(embedding, ids, entries=entries).compute(tokens)
        found = SimilarityRows(embedding.to(DEVICE), ids, entries=entries).compute(tokens)
        torch.testing.assert_close(found.values.cpu(), want.values, rtol=1e-4, atol=1e-7)


def search() -> None:
    relative = random_map(900, 301, 9, seed=0)
    logits = random_logits(2, 900, seed=0)
    top = logits.topk(128, dim=1)
    target = torch.softmax(torch.randn(2, 301), dim=1)
    tail = logits.scatter(1, top.indices, float("-inf")).logsumexp(dim=1)
    given = (top.values.contiguous(), top.indices.int(), tail, target)
    want = inverse_search(*given, relative.rows, learning_rate=0.2)
    rows = relative.to(DEVICE).rows
    found = inverse_search(*(one.to(DEVICE) for one in given), rows, learning_rate=0.2)
    torch.testing.assert_close(found.cpu(), want, atol=1e-3, rtol=0)


def step() -> None:
    for k, entries in ((128, 32), (1500, 32), (3, 1)):
        maps = [random_map(vocab, 4001, entries, seed=i) for i, vocab in enumerate((5000, 7001))]
        logits = [random_logits(2, one.vocab_size, seed=i) for i, one in enumerate(maps)]
        settings = {"candidates": k, "learning_rate": 0.2, "min_probability": 1e-4}
        want = step_on(logits, maps, [0.5, 0.5], **settings)[1]
        there = [one.to(DEVICE) for one in logits], [one.to(DEVICE) for one in maps]
        torch.testing.assert_close(step_on(*there, [0.5, 0.5], **settings)[1].cpu(), want, atol=1e-3, rtol=0)


if __name__ == "__main__":
    for part in (topk, rows, search, step):
        part()
        torch.cuda.synchronize()
        print(f"sanitize: {part.__name__} done", flush=True)
