"""Drawing the next token of a batch's texts, against transformers' warpers and torch's multinomial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import beside, check_equal
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.members.member import Member

TEMPERATURE, TOP_P = 0.7, 0.95


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_sampling(benchmark: Any, pair: list[Member], logits: list[torch.Tensor], rows: int) -> None:
    scores = logits[1].repeat(-(-rows // len(logits[1])), 1)[:rows].contiguous()
    settings = Settings.read(
        pair[1], do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, seed=list(range(rows))
    )
    ids = [[0]] * rows
    chooser = Chooser(settings, ids, "cpu")
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])
    unread, generator = torch.empty(rows, 0, dtype=torch.long), torch.Generator()

    def plain() -> torch.Tensor:
        probs = torch.softmax(warpers(unread, scores), dim=-1)  # type: ignore[arg-type]
        return torch.multinomial(probs, 1, generator=generator)

    texts = list(range(rows))
    equality = check_equal(
        "scores after the warpers",
        torch.softmax(chooser.processed(scores, texts, ids), dim=-1),
        torch.softmax(warpers(unread, scores), dim=-1),  # type: ignore[arg-type]
        1e-6,
    )
    beside(
        benchmark,
        lambda: chooser.choose(scores, texts, ids),
        plain,
        name=f"sampling, temperature {TEMPERATURE}, top-p {TOP_P}, {rows} x {scores.shape[1]:,} scores",
        baseline_name="transformers' warpers and torch.multinomial",
        equality=equality,
        rounds=20,
    )
