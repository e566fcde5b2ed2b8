"""ME's draws: one member speaks for each token, and the tokens have the distribution of the average."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from oracle import random_logits

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.generation import BatchGeneration
from deepen_ext.decoding.shares import drawn
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.measure.tuning.tune import tune
from deepen_ext.members.member import Member

PROMPT = "The history of tea begins in ancient China, where, it is said, leaves from a wild tree blew into"
TEXTS = [PROMPT, "日本の", "The capital of France is", "Once", "def quicksort(values):\n    if len("]
SAMPLE: dict[str, Any] = {"do_sample": True, "seed": 5, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def pair(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="draw", weights=[0.35, 0.65])


def traced(ensemble: Ensemble, prompts: Any, **settings: Any) -> tuple[BatchGeneration, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    return ensemble.generate(prompts, trace=records.append, **settings), records


def test_a_members_part_of_the_weights() -> None:
    weights = [0.5, 0.0, 0.3, 0.2]
    assert [drawn([0, 1, 2, 3], weights, share) for share in (0, 0.49, 0.5, 0.79, 0.81, 0.99)] == [
        *(0, 0, 2, 2),
        *(3, 3),
    ]
    assert [drawn([0, 3], weights, share) for share in (0.7, 0.72)] == [0, 3]  # of those that would speak
    assert drawn([0, 1], [0.0, 0.0, 0.5, 0.5], 0.5) == 0


def test_its_likelihood_is_the_average(pair: Ensemble) -> None:
    logits = [random_logits(3, one.vocab_size, seed=i) for i, one in enumerate(pair.members)]
    average = pair.variant(fuser="union-vocab").fuser.step(logits, pair.weights)
    assert torch.equal(pair.fuser.step(logits, pair.weights).logits, average.logits)


def test_tokens_have_the_distribution_of_the_average(pair: Ensemble) -> None:
    count = 600
    settings = {"max_new_tokens": 1, "do_sample": True, "boundary_aware": False}
    ensemble = pair.variant(boundary_aware=settings.pop("boundary_aware"))
    steps: list[dict[str, Any]] = []
    ensemble.variant(fuser="union-vocab").generate(PROMPT, max_new_tokens=1, trace=steps.append)
    want = {one["id"]: one["probability"] for one in steps[0]["fused"]}
    tokens: Counter[int] = Counter()
    spoke = 0
    for start in range(0, count, 100):
        seeds = list(range(start, start + 100))
        written, records = traced(ensemble, [PROMPT] * 100, seed=seeds, **settings)
        tokens.update(one.token_ids[0] for one in written)
        spoke += sum(one["not_asked"] is None for one in records)
        for one in records:
            drawn = [member["weight"] for member in one["members"]]
            assert drawn == ([1.0] if one["not_asked"] == "main model drawn" else [0.0, 1.0])
    assert abs(spoke / count - 0.65) < 4 * math.sqrt(0.65 * 0.35 / count)
    assert len(want) == 5
    for token, probability in want.items():
        assert abs(tokens[token] / count - probability) < 4 * math.sqrt(probability / count) + 1e-6
    # It is the distribution of neither member.
    alone = [{one["id"]: one["probability"] for one in member["top"]} for member in steps[0]["members"]]
    assert max(abs(alone[0].get(token, 0) - probability) for token, probability in want.items()) > 0.1


@pytest.mark.parametrize("fusion", [{}, {"weights": "prompt"}, {"weights": [0.8, 0.2]}], ids=str)
def test_the_same_text_with_and_without_drafts_and_alone(pair: Ensemble, fusion: dict[str, Any]) -> None:
    ensemble = pair.variant(**fusion)
    want, records = traced(ensemble, TEXTS, draft=0, **SAMPLE)
    reasons = {one["not_asked"] for one in records}
    assert {None, "main model drawn"} <= reasons
    assert sum(one.changed_tokens for one in want) > 0
    for drafts in ({"draft": 3}, {"draft": 8}, {"draft": 4, "drafter": ensemble.names[1]}):
        found, others = traced(ensemble, TEXTS, **SAMPLE, **drafts)
        assert [one.token_ids for one in found] == [one.token_ids for one in want]
        assert found.timings.stood > 0
        places = [
            {(one["row"], one["position"]): one["not_asked"] for one in each} for each in (records, others)
        ]
        assert places[0] == places[1]
    seeds = [11, 12, 13, 14, 15]
    batch = ensemble.generate(TEXTS, **{**SAMPLE, "seed": seeds}, batch_size=2)
    for text, seed, one in zip(TEXTS, seeds, batch, strict=True):
        assert ensemble.generate(text, **{**SAMPLE, "seed": seed}).token_ids == one.token_ids


def test_three_members_and_only_the_drawn_one_is_asked(
    pair: Ensemble, tiny_smollm2: Member, tiny_gemma: Member
) -> None:
    three = Ensemble([tiny_gemma, tiny_smollm2, tiny_gemma], fuser="draw")
    _, records = traced(three, TEXTS, **SAMPLE)
    asked = Counter(tuple(member["name"] for member in one["members"][1:]) for one in records)
    assert {len(names) for names in asked} == {0, 1}
    assert len(asked) == 3  # nobody, and each of the two


def test_no_step_waits_for_the_tables(pair: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any step may be the first to draw an assistant: what is made then would count as a token's time."""
    fresh = pair.variant(weights=[0.5, 0.5])

    def late(*_: int) -> torch.Tensor:
        raise AssertionError("a table is made in a step")

    monkeypatch.setattr(TokenBridge, "table", late)
    _, records = traced(fresh, TEXTS, **SAMPLE)
    assert any(one["not_asked"] is None for one in records)


def test_what_it_cannot_do_is_refused(pair: Ensemble) -> None:
    with pytest.raises(InputError, match=r"fuser='draw' is a way to sample; set do_sample=True"):
        pair.generate(PROMPT)
    with pytest.raises(InputError, match=r"leave out confidence 0.5, or use fuser='union-vocab'"):
        pair.variant(confidence=0.5)
    with pytest.raises(InputError, match="tune that, and use its weights"):
        tune(pair.members, [], fuser="draw")
