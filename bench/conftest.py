"""Fixtures of the benchmarks: the demo pair, its ensemble, and its logits on real prompts."""

from __future__ import annotations

import pytest
import torch
from common import PROMPTS, TIMED

from deepen_ext import Ensemble, demo
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member


@pytest.fixture(scope="session")
def pair() -> list[Member]:
    return [load_member(path, backend="transformers") for path in demo.members()]


@pytest.fixture(scope="session")
def ensemble(pair: list[Member]) -> Ensemble:
    return Ensemble(pair, cache=False, **TIMED)


@pytest.fixture(scope="session")
def logits(pair: list[Member]) -> list[torch.Tensor]:
    """Of each member, float32 [len(PROMPTS), V]: the token after each prompt."""
    found = []
    for member in pair:
        ids = [member.vocabulary.prefix_ids + member.vocabulary.encode(prompt) for prompt in PROMPTS]
        answers = [member.backend.open().ask({0: one}, 1) for one in ids]
        found.append(torch.cat([answer.wait().scores() for answer in answers]))
    return found
