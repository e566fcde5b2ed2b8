"""Drafts on a card: captured steps that the main model writes without the host, and their verification."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import changed
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from deepen_ext import Ensemble
from deepen_ext.decoding.drafts.main_word import Word, WordReader
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

PROMPTS = ["The history of tea begins in", PROSE[:80], "Once"]
SETTINGS = {
    "greedy": {},
    "certified": {"certified_skip": True},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 7},
}


def words() -> Tokenizer:
    """Byte-level BPE with merges: other tokens than those of one byte."""
    tokenizer = one_byte_tokens()
    trainer = BpeTrainer(
        vocab_size=500, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def pair_on(device: str, folder: Path) -> list[Member]:
    """Two small models that have read the same text, in float32."""
    members = []
    for seed, (name, tokenizer) in enumerate({"words": words(), "bytes": one_byte_tokens()}.items(), start=1):
        member = load_member(save_model(folder / name, tokenizer, seed=seed), device="cpu")
        reader = tiny_reader(member, name, PROSE[300 * (seed - 1) :], seed=seed)
        members.append(changed(reader, model=reader.model.to(device), device=torch.device(device)))
    return members


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    # Not the default fuser, which lets the better reader of a prompt write alone: no token would be changed.
    members = pair_on("cuda:0", tmp_path_factory.mktemp("models"))
    return Ensemble(members, fuser="deepen", learning_rate=0.5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_the_same_text_with_drafts(pair: Ensemble, settings: str, prompts: list[str]) -> None:
    asked = {"max_new_tokens": 60, **SETTINGS[settings]}
    assert pair.members[0].backend.capabilities.writes
    plain = pair.generate(prompts, **asked, draft=0)
    assert any(one.changed_tokens for one in plain)
    for draft in (1, 3, 7, "auto"):
        found = pair.generate(prompts, **asked, draft=draft)
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        if draft != "auto":
            assert 0 < found.timings.stood < found.timings.drafted
            assert found.timings.steps < plain.timings.steps


def waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device in a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in found)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_a_cycle_waits_twice(
    pair: Ensemble, settings: str, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the draft, once for its verification, however many tokens the draft has."""
    assert waits(lambda: torch.ones(1, device="cuda:0").item()) == 1  # they are seen at all
    places = []
    read = WordReader.read

    def counted(reader: WordReader, said: Distribution, *more: Any, **named: Any) -> Word:
        places.append(len(said))
        return read(reader, said, *more, **named)

    monkeypatch.setattr(WordReader, "read", counted)
    run = pair.start(prompts, max_new_tokens=150, draft=3, drafter="main", **SETTINGS[settings])
    steps = iter(run)
    for _ in range(12):  # shapes are captured on the way
        next(steps)
    places.clear()
    counts = [waits(lambda: next(steps)) for _ in range(12)]
    run.close()
    assert places.count(4 * len(prompts)) >= 10
    assert max(counts) <= 2
