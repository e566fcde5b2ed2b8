"""The whole fusion step on the demo pair's real logits, against the paper in torch with dense rows."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from common import beside, check_equal
from torch.nn import functional

from deepen_ext import Ensemble, RelativeMap, fuse_logits
from deepen_ext.fusers import DeepenFuser, reference
from deepen_ext.members.member import Member

PAPER_ANCHORS = 4000
LEARNING_RATE = 0.15


def _paper_matrix(embedding: torch.Tensor, anchor_ids: torch.Tensor) -> torch.Tensor:
    """The paper's relative matrix by chunked products: `reference.relative_matrix` goes anchor by anchor."""
    anchors = functional.normalize(embedding[anchor_ids], dim=1)
    matrix = torch.empty(len(embedding), len(anchor_ids))
    for rows, out in zip(embedding.split(4096), matrix.split(4096), strict=True):
        cosines = functional.normalize(rows, dim=1) @ anchors.T
        out.copy_(torch.softmax(100 * functional.normalize(cosines, dim=1), dim=1))
    return matrix


@pytest.fixture(scope="module")
def matrices(pair: list[Member], ensemble: Ensemble) -> list[torch.Tensor]:
    """[49,152, 4,000] and [262,144, 4,000] float32: 5 GB."""
    chosen = torch.linspace(0, len(ensemble.anchors) - 1, PAPER_ANCHORS).long()
    return [
        _paper_matrix(member.embedding, ids[chosen])
        for member, ids in zip(pair, ensemble.anchors.token_ids, strict=True)
    ]


@pytest.fixture(scope="module")
def equality(logits: list[torch.Tensor], matrices: list[torch.Tensor]) -> str:
    """The product on these very matrices, nothing left out, gives what the paper in torch gives."""
    given = [one[:1].contiguous() for one in logits]
    maps = [RelativeMap.from_dense(matrix) for matrix in matrices]
    every = max(one.vocab_size for one in maps)
    ours = fuse_logits(given, maps, [0.5, 0.5], learning_rate=LEARNING_RATE, candidates=every)
    wanted = reference.fuse_logits(given, matrices, [0.5, 0.5], learning_rate=LEARNING_RATE)
    return check_equal("fused logits on the same dense matrices", ours, wanted, 1e-3)


@pytest.mark.parametrize("settings", ["all candidates", "the ensemble's own settings"])
def test_fusion_step(
    benchmark: Any,
    ensemble: Ensemble,
    logits: list[torch.Tensor],
    matrices: list[torch.Tensor],
    equality: str,
    settings: str,
) -> None:
    fuser = ensemble.fuser
    if settings == "all candidates":
        fuser = DeepenFuser(ensemble.maps, learning_rate=LEARNING_RATE)
    steps = [[one[b : b + 1].contiguous() for one in logits] for b in range(len(logits[0]))]
    for given in steps:
        fuser.step(given, ensemble.weights)  # every row that the timed steps need is known: warm
    ours, theirs = cycle(steps), cycle(steps)
    beside(
        benchmark,
        lambda: fuser.step(next(ours), ensemble.weights),
        lambda: reference.fuse_logits(next(theirs), matrices, [0.5, 0.5], learning_rate=LEARNING_RATE),
        name=f"whole fusion step, demo pair, {len(ensemble.anchors):,} anchors, {settings}",
        baseline_name=f"the paper in torch, dense rows, only {PAPER_ANCHORS:,} anchors",
        equality=equality,
        rounds=200,
        baseline_every=25,
        max_us=1000,
        min_ratio=500,
        note="warm rows",
    )
