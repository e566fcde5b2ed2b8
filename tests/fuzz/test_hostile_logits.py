"""The loop over members whose logits are hostile: a text, or an error that names the member; and the ensemble
goes on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counted
from sessions import changed

from deepen_ext import Ensemble
from deepen_ext.errors import DeepenError
from deepen_ext.fusers.make import FUSERS
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "Once", "def f(x):\n"]
BROKEN = ("nan", "inf", "empty")  # rows without a softmax


def one_of(logits: torch.Tensor, value: float, others: float) -> torch.Tensor:
    found = torch.full_like(logits, others)
    found[..., 66] = value
    return found


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda logits: logits,
    "all equal": lambda logits: torch.full_like(logits, 3.0),
    "all zero": torch.zeros_like,
    "one-hot": lambda logits: one_of(logits, 1e4, 0.0),
    "-inf but one": lambda logits: one_of(logits, 1.0, -torch.inf),
    "-inf but two": lambda logits: one_of(logits, 1.0, -torch.inf).index_fill(-1, torch.tensor([70]), 1.0),
    "denormals": lambda logits: logits * 1e-39,
    "1e38": lambda logits: logits.sign() * 1e38,
    "the largest": lambda logits: logits.sign() * torch.finfo(torch.float32).max,
    "far below": lambda logits: logits - 1e30,
    "nan": lambda logits: logits.index_fill(-1, torch.tensor([9]), torch.nan),
    "inf": lambda logits: logits.index_fill(-1, torch.tensor([9]), torch.inf),
    "empty": lambda logits: torch.full_like(logits, -torch.inf),
}


class Hostile:
    """A member whose logits become hostile, in all rows or in one, from some forward pass on."""

    def __init__(self, member: Member) -> None:
        model: Any = copy.deepcopy(member.model)
        self.kind, self.row, self.passes = "plain", -1, 0
        model.register_forward_hook(self._spoil)
        self.member = changed(member, model=model)

    def _spoil(self, _module: Any, _given: Any, result: Any) -> None:
        self.passes -= 1
        if self.passes < 0 and self.row < len(result.logits):
            rows = slice(None) if self.row < 0 else slice(self.row, self.row + 1)
            result.logits[rows] = KINDS[self.kind](result.logits[rows])

    def be(self, kind: str, row: int = -1, after: int = 0) -> None:
        self.kind, self.row, self.passes = kind, row, after


@pytest.fixture(scope="module")
def pair(one_byte_folders: list[Path]) -> list[Hostile]:
    return [Hostile(load_member(folder)) for folder in one_byte_folders]


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_a_text_or_an_error_that_says_who(pair: list[Hostile], fuser: str) -> None:
    ensemble = Ensemble([one.member for one in pair], fuser=fuser, cache=False)
    for one in pair:
        one.be("plain")
    sampling = {"do_sample": True, "seed": 1} if fuser == "draw" else {}
    plain = {"max_new_tokens": 4, **sampling}
    wanted = ensemble.generate(PROMPTS, **plain).texts
    refused = 0
    with counted(f"hostile logits, {fuser}", 4) as seeds:
        for seed in seeds:
            chance = random.Random(seed)
            kinds = [chance.choice(list(KINDS)) for _ in pair]
            if seed % 4 == 0:
                kinds[0] = chance.choice(BROKEN)
            for one, kind in zip(pair, kinds, strict=True):
                one.be(kind, row=chance.choice([-1, 0, 1, 2]), after=chance.choice([0, 0, 2, 4]))
            # In every row, from the first pass on: one of four calls is refused for certain.
            if seed % 4 == 0:
                pair[0].be(kinds[0])
            settings: dict[str, Any] = dict(plain)
            if fuser != "spans" and chance.random() < 0.4:  # which has no sampling
                settings |= {"do_sample": True, "temperature": chance.choice([0.01, 1.0, 5.0]), "seed": seed}
            prompts: Any = PROMPTS if chance.random() < 0.7 else PROMPTS[0]
            where = f"{fuser}, seed {seed}, {kinds}"
            error: Exception | None = None
            try:
                found = ensemble.generate(prompts, **settings)
            except Exception as one:
                error = one
            if error is None:
                texts = found.texts if prompts is PROMPTS else [found.text]
                assert all(len(text) <= 4 for text in texts), where
            else:
                assert isinstance(error, DeepenError), f"{where}: {error!r}"
                broken = any(kind in BROKEN for kind in kinds)
                # Divided by a temperature, or summed over tokens, these are beyond float32.
                assert broken or {"1e38", "the largest"}.intersection(kinds), f"{where}: {error}"
                named = any(one.member.name in str(error) for one in pair)
                assert named or "text " in str(error), f"{where}: {error}"
                refused += 1
            # Whatever it was, the next call is the one it would have been.
            for one in pair:
                one.be("plain")
            assert ensemble.generate(PROMPTS, **plain).texts == wanted, where
    assert refused > 0 or len(seeds) < 4
