"""Rules of weighing, against the same computed by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deepen_ext import Ensemble
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.parts import Part, Said
from deepen_ext.fusers.weighing.confidence import Confidence
from deepen_ext.fusers.weighing.consistency import Consistency, anchored
from deepen_ext.fusers.weighing.disagreement import Disagreement
from deepen_ext.fusers.weighing.gate import Gate
from deepen_ext.fusers.weighing.make import RULES
from deepen_ext.fusers.weighing.margin import Margin
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member

# Settings of rules that need some.
NUMBERS: dict[str, dict[str, Any]] = {
    "confidence": {"confidence": 0.5},
    "gate": {"gate": [-1.0, 0.5, 0.5, 0.2]},
}


@pytest.fixture
def bridge(smollm2: Member, gemma: Member) -> TokenBridge:
    return TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])


def said_by(members: list[Member], rows: list[list[dict[str, float]]]) -> list[Said]:
    """What members say: of each member and row, texts (each a token of it) with their probabilities."""
    found = []
    for i, (member, of_rows) in enumerate(zip(members, rows, strict=True)):
        logits = torch.full((len(of_rows), member.vocab_size), -20.0)
        for row, texts in enumerate(of_rows):
            for text, probability in texts.items():
                (token,) = member.vocabulary.encode(text)[-1:]
                logits[row, token] = torch.tensor(probability).log()
        part = Part(
            i,
            member.name,
            (one := Distribution(member.name, member.vocab_size, 128, logits)).topk,
            range(len(of_rows)),
            one,
        )
        found.append(Said(i, member.name, part.topk, part, None))
    return found


SURE = {" Paris": 0.9, " London": 0.1}
UNSURE = {" Paris": 0.4, " London": 0.35, " Rome": 0.25}
OTHER = {" London": 0.45, " Paris": 0.3, " Rome": 0.25}


def nats(texts: dict[str, float]) -> float:
    """The entropy of these probabilities."""
    return -math.fsum(one * math.log(one) for one in texts.values())


def test_margin(smollm2: Member, gemma: Member) -> None:
    said = said_by([smollm2, gemma], [[SURE, UNSURE], [UNSURE, OTHER]])
    weights = Margin().weigh(torch.tensor([[0.5, 0.5], [0.8, 0.2]]), said)
    want = torch.tensor([[0.8, 0.05], [0.8 * 0.05, 0.2 * 0.15]])
    torch.testing.assert_close(weights, want / want.sum(1, keepdim=True), atol=1e-3, rtol=1e-3)


def test_confidence_is_a_gate(smollm2: Member, gemma: Member, bridge: TokenBridge) -> None:
    said = said_by([smollm2, gemma], [[SURE, UNSURE], [UNSURE, OTHER]])
    weights = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    by_gate = Gate([-1.5, 0, 0, 0], bridge).weigh(weights, said)
    torch.testing.assert_close(by_gate, Confidence(1.5).weigh(weights, said))
    assert by_gate[0, 0] > 0.6


def test_what_a_gate_sees(smollm2: Member, gemma: Member, bridge: TokenBridge) -> None:
    said = said_by([smollm2, gemma], [[SURE, SURE], [UNSURE, OTHER]])
    seen = Gate([0, 0, 0, 0], bridge).features(said)
    assert seen[..., 2].tolist() == [[1, 1], [1, 0]]  # first choices: the same, then another
    assert seen[..., 3].tolist() == [[1, 0], [1, 0]]
    assert seen[0, :, 1].tolist() == pytest.approx([0.8, 0.05], abs=1e-3)
    assert seen[0, 0, 0] == pytest.approx(0.325, abs=0.01)  # nats


def test_consistency_keeps_half_for_the_main_model(smollm2: Member, gemma: Member) -> None:
    certain = {" Paris": 0.999, " Rome": 0.001}
    said = said_by([smollm2, gemma], [[SURE, UNSURE, certain], [UNSURE, SURE, SURE]])
    weights = Consistency().weigh(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]), said)
    sure, unsure, most = (nats(one) for one in (SURE, UNSURE, certain))
    assert weights[:, 0].tolist() == pytest.approx(
        [unsure / (sure + unsure), 0.5, 0.2 * sure / (0.2 * sure + 0.8 * most)], abs=0.02
    )
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 3)
    torch.testing.assert_close(
        anchored(torch.tensor([[0.2, 0.6, 0.2], [0.0, 0.7, 0.3], [1.0, 0.0, 0.0]])),
        torch.tensor([[0.5, 0.375, 0.125], [0.0, 0.7, 0.3], [1.0, 0.0, 0.0]]),
    )


def test_a_silent_member_is_no_measure_for_the_others(smollm2: Member, gemma: Member) -> None:
    """Next to its certainty the weights of all others would be 0."""
    said = said_by([smollm2, gemma, gemma], [[UNSURE], [OTHER], [{" Rome": 1.0}]])
    found, want = (
        Confidence(200.0).weigh(torch.tensor([[0.5, 0.5, 0.0][:count]]), said[:count]) for count in (3, 2)
    )
    assert found[0].tolist() == [*want[0].tolist(), 0]
    assert want.sum() == pytest.approx(1)


def test_disagreement(smollm2: Member, gemma: Member, bridge: TokenBridge) -> None:
    """Fused only where first choices differ and nobody is sure."""
    rows = [[UNSURE, UNSURE, UNSURE, SURE], [UNSURE, OTHER, {" London": 0.6, " Rome": 0.4}, OTHER]]
    weights = Disagreement(bridge).weigh(torch.full((4, 2), 0.5), said_by([smollm2, gemma], rows))
    assert weights.tolist() == [[1, 0], [0.5, 0.5], [1, 0], [1, 0]]


def test_who_has_no_weight_neither_differs_nor_is_sure(smollm2: Member, gemma: Member) -> None:
    """And where the main model has none, it does not write alone."""
    members = [smollm2, gemma, gemma]
    bridge = TokenBridge([one.vocabulary for one in members], [one.eos_ids for one in members])
    rows = [[UNSURE] * 3, [OTHER, UNSURE, UNSURE], [SURE, OTHER, UNSURE]]
    given = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.6, 0.4]])
    weights = Disagreement(bridge).weigh(given, said_by(members, rows))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [1, 0, 0], [0.0, 0.6, 0.4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fuser", ["deepen", "follow"])
def test_where_the_main_model_writes_alone_nothing_moves(
    smollm2: Member, gemma: Member, fuser: str, dtype: torch.dtype
) -> None:
    """The search would pull its candidates to 0 (weight decay), and by rounding noise."""
    third = {" Rome": 0.4, " London": 0.35, " Paris": 0.25}
    rows = [[UNSURE, UNSURE, UNSURE, SURE], [UNSURE, OTHER, third, OTHER]]
    said = [one.part.logits for one in said_by([smollm2, gemma], rows)]
    generator = torch.Generator().manual_seed(0)
    logits = [(one + 0.01 * torch.randn(one.shape, generator=generator)).to(dtype) for one in said]
    ensemble = Ensemble([smollm2, gemma], fuser=fuser, weighing="disagreement", cache=False)
    plain = ensemble.variant(weighing="confidence").fuser
    found, fused = ensemble.fuser.step(logits, [0.5, 0.5]), plain.step(logits, [0.5, 0.5])
    assert found.weights is not None
    assert found.weights.tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5], [1, 0]]
    alone, others = [0, 3], [1, 2]
    assert torch.equal(found.logits[alone], logits[0][alone])
    assert torch.equal(found.chosen[alone].long(), logits[0][alone].argmax(dim=1))
    assert torch.equal(found.logits[others], fused.logits[others])
    assert torch.equal(found.chosen[others], fused.chosen[others])
    assert not any(torch.equal(fused.logits[row], logits[0][row]) for row in range(4))
    order = logits[0].sort(dim=1, descending=True, stable=True).indices
    own = logits[0].double().log_softmax(dim=1)
    for nth in (0, 1, 20, 3000):
        tokens = order[:, nth]
        given = ensemble.fuser.likelihoods(found.parts, [0.5, 0.5], tokens)
        want = own.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(given[alone], want[alone], atol=2e-6, rtol=0)
        assert torch.equal(given[others], plain.likelihoods(fused.parts, [0.5, 0.5], tokens)[others])


@pytest.mark.parametrize("weighing", RULES)
def test_a_silent_member_stays_silent(smollm2: Member, gemma: Member, weighing: str) -> None:
    ensemble = Ensemble([smollm2, gemma], fuser="union-vocab", weighing=weighing, **NUMBERS.get(weighing, {}))
    logits = [torch.randn(3, one.vocab_size) for one in ensemble.members]
    step = ensemble.fuser.step([logits[0], logits[1][:1]], [0.5, 0.5], rows=[None, [1]])
    assert torch.equal(step.logits[0], logits[0][0])
    assert torch.equal(step.logits[2], logits[0][2])
    assert sum(step.shares[1]) == pytest.approx(1)


@pytest.mark.parametrize("weighing", RULES)
def test_drafts_change_nothing(tiny_smollm2: Member, tiny_gemma: Member, weighing: str) -> None:
    numbers = NUMBERS.get(weighing, {})
    ensemble = Ensemble([tiny_smollm2, tiny_gemma], fuser="average", weighing=weighing, **numbers)
    texts = [
        ensemble.generate("One two three", max_new_tokens=24, do_sample=True, seed=5, draft=draft).token_ids
        for draft in (0, 3)
    ]
    assert texts[0] == texts[1]
