"""Each operation against the same mathematics in torch, on the demo pair's real logits and embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import beside, check_equal

from deepen_ext import Ensemble, ops
from deepen_ext.fusers import reference
from deepen_ext.members.member import Member
from deepen_ext.space.row_sources import SimilarityRows

K = 128
LEARNING_RATE = 0.15
CASES = [("float32", 1), ("float32", 8), ("float16", 1), ("float16", 8), ("bfloat16", 1), ("bfloat16", 8)]


@pytest.mark.parametrize(("dtype", "batch"), CASES)
def test_topk_softmax(benchmark: Any, logits: list[torch.Tensor], dtype: str, batch: int) -> None:
    given = logits[1][:batch].to(getattr(torch, dtype)).contiguous()

    def baseline() -> Any:
        return torch.softmax(given, dim=-1, dtype=torch.float32).topk(K, dim=-1)

    exact = torch.softmax(given.double(), dim=-1)
    ours, wanted = ops.topk_softmax(given, K), exact.topk(K, dim=-1)
    check_equal("probabilities of the ids", exact.gather(1, ours.ids.long()), wanted.values, 0)
    equality = check_equal("probabilities and a float64 softmax", ours.probs, wanted.values, 1e-6)
    # torch's own float32 sum over so many logits is good to 1e-5 only.
    check_equal("the baseline and a float64 softmax", baseline().values, wanted.values, 5e-5)
    beside(
        benchmark,
        lambda: ops.topk_softmax(given, K),
        baseline,
        name=f"topk_softmax, V {given.shape[1]:,}, k {K}, {dtype}, B {batch}",
        baseline_name="torch.softmax(float32) + topk",
        equality=equality,
        rounds=300 if batch == 1 else 60,
        min_ratio={("float32", 1): 3, ("float32", 8): 4}.get((dtype, batch)),
    )


@pytest.mark.parametrize("count", [8, 128])
@pytest.mark.parametrize("which", [0, 1])
def test_relative_rows(
    benchmark: Any, pair: list[Member], ensemble: Ensemble, logits: list[torch.Tensor], which: int, count: int
) -> None:
    embedding, anchor_ids = pair[which].embedding, ensemble.anchors.token_ids[which]
    source = SimilarityRows(embedding, anchor_ids)
    tokens = ops.topk_softmax(logits[which], K).ids.flatten().unique().long()[:count]
    # The baseline gets its centred, normalised anchors made beforehand; ours reads the embedding in place.
    mean = embedding[anchor_ids].mean(dim=0)
    anchors = torch.nn.functional.normalize(embedding[anchor_ids] - mean, dim=1)

    def baseline() -> Any:
        queries = torch.nn.functional.normalize(embedding[tokens] - mean, dim=1)
        return torch.softmax(source.temperature * (queries @ anchors.T), dim=1).topk(source.entries, dim=1)

    ours, wanted = source.compute(tokens), baseline()
    equality = check_equal("row values", ours.values, wanted.values, 2e-5)
    beside(
        benchmark,
        lambda: source.compute(tokens),
        baseline,
        name=f"relative_rows, {count} tokens, {len(anchor_ids):,} anchors, d {embedding.shape[1]}",
        baseline_name="torch matmul of centred, normalised embeddings + softmax + topk",
        equality=equality,
        rounds=5,
    )


def _dense(relative: Any, ids: torch.Tensor) -> torch.Tensor:
    """The whole rows of these tokens, and a uniform one for the tail: float32 [K + 1, A]."""
    rows, anchors = relative.rows, relative.anchors
    columns, values = rows.columns[ids], rows.values[ids]
    used = columns >= 0
    share = rows.rest[ids] / (anchors - used.sum(dim=1)).clamp(min=1)
    dense = share[:, None].repeat(1, anchors)
    token, entry = torch.nonzero(used, as_tuple=True)
    dense[token, columns[token, entry].long()] = values[token, entry]
    return torch.cat([dense, torch.full((1, anchors), 1 / anchors)])


class _Step:
    """The inputs of one fusion step after top-k: sparse for the core, whole for torch."""

    def __init__(self, ensemble: Ensemble, logits: list[torch.Tensor]) -> None:
        self.given = [one[:1].contiguous() for one in logits]
        self.topk = [ops.topk_softmax(one, K) for one in self.given]
        for relative, top in zip(ensemble.maps, self.topk, strict=True):
            relative.ensure(top.ids)
        self.rows = [relative.rows for relative in ensemble.maps]
        self.weights = ensemble.weights
        ids = [top.ids[0].long() for top in self.topk]
        self.dense = [_dense(*one) for one in zip(ensemble.maps, ids, strict=True)]
        candidates = self.given[0][:, ids[0]]
        self.tail = torch.logsumexp(self.given[0].index_fill(1, ids[0], -torch.inf), dim=1)
        self.start = torch.cat([candidates, self.tail[:, None]], dim=1)
        self.fixed = torch.zeros(1, K + 1, dtype=torch.bool)
        self.fixed[:, K] = True

    def distributions(self) -> list[torch.Tensor]:
        return [torch.cat([top.probs, top.tail[:, None]], dim=1).log() for top in self.topk]

    def target(self) -> torch.Tensor:
        return reference.aggregate(self.distributions(), self.dense, self.weights)

    def search(self, target: torch.Tensor) -> torch.Tensor:
        return reference.inverse_search(
            self.start, self.dense[0], target, learning_rate=LEARNING_RATE, fixed=self.fixed
        )


def test_inverse_search(benchmark: Any, ensemble: Ensemble, logits: list[torch.Tensor]) -> None:
    step = _Step(ensemble, logits)
    target = step.target()
    start = step.start[:, :K].contiguous()

    def ours() -> torch.Tensor:
        return ops.inverse_search(
            start, step.topk[0].ids, step.tail, target, step.rows[0], learning_rate=LEARNING_RATE
        )

    moved = float((ours() - start).abs().max())
    assert moved > 0.01, "the search moves nothing: the equality below would say nothing"
    equality = check_equal("logits", ours(), step.search(target)[:, :K], 1e-3)
    beside(
        benchmark,
        ours,
        lambda: step.search(target),
        name=f"inverse_search, K {K}, m 32, {len(ensemble.anchors):,} anchors, T 5, B 1",
        baseline_name="the same search in torch with autograd, the candidates' rows dense",
        equality=equality,
        rounds=100,
        baseline_every=20,
    )


def test_fuse(benchmark: Any, ensemble: Ensemble, logits: list[torch.Tensor]) -> None:
    step = _Step(ensemble, logits)
    weights = torch.tensor([step.weights])
    members = [ops.FuseInput(*one) for one in zip(step.topk, step.rows, strict=True)]
    work = step.given[0].clone()

    def ours() -> torch.Tensor:
        # Both on the logits as they are, as in the paper.
        return ops.fuse(work, members, weights, learning_rate=LEARNING_RATE, log_probs=False)[0]

    equality = check_equal("logits", ours(), step.search(step.target())[:, :K], 1e-3)
    beside(
        benchmark,
        ours,
        lambda: step.search(step.target()),
        before=lambda: work.copy_(step.given[0]),
        name=f"fuse after top-k, 2 members, k {K}, m 32, {len(ensemble.anchors):,} anchors, T 5, B 1",
        baseline_name="the same step in torch with autograd, the top-k tokens' rows dense",
        equality=equality,
        rounds=200,
        baseline_every=40,
        max_us=150,
        note="one thread: a row is one thread's work",
    )
