"""Fitting a gate: on numbers whose best gate is known, then with tiny members through `tune`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import AWKWARD, PROSE
from typer.testing import CliRunner

from deepen_ext.commands.cli import app
from deepen_ext.commands.tune import _show
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import fuser_class
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.tuning.dev_items import DevSet
from deepen_ext.measure.tuning.fit_gate import (
    NO_GATE,
    FittedGate,
    GateEvidence,
    check_gate_fuser,
    fit_gate,
)
from deepen_ext.measure.tuning.tune import tune
from deepen_ext.members.loading import load_members
from deepen_ext.members.member import Member
from deepen_ext.presets import load_preset

TOKENS = 40  # of a made item


def made(items: int, gate: Sequence[float], seed: int = 0) -> list[GateEvidence]:
    """Items of two members, one of which knows each token: that it is i has the probability that `gate` says.

    Whoever knows a token gives it 0.9, the other one 0.001: then no other gate is as likely.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(items):
        features = torch.rand(TOKENS, 2, 4, generator=generator, dtype=torch.float64)
        features[..., 0] *= 4  # nats
        features[..., 2] = (features[..., 2] > 0.5).double()
        features[:, 0, 2] = 1
        features[..., 3] = torch.tensor([1.0, 0.0])
        weights = torch.full((TOKENS, 2), 0.5, dtype=torch.float64)
        by_gate = (features @ torch.tensor(gate, dtype=torch.float64)).softmax(dim=1)
        knows = torch.rand(TOKENS, generator=generator) < by_gate[:, 0]
        right = torch.stack([knows, ~knows], dim=1)
        found.append(GateEvidence(features, weights, torch.where(right, 0.9, 0.001).double().log()))
    return found


def fitted(items: Sequence[GateEvidence], confidence: float = 0.0) -> FittedGate:
    """The gate, and its worth against a confidence: with its numbers the same rule (see `Gate`)."""

    def measure(gate: tuple[float, ...], which: slice) -> list[float]:
        return [one.bits(gate) for one in items[which]]

    without = [one.bits((-confidence, 0.0, 0.0, 0.0)) for one in items]
    return fit_gate(items, without, [100] * len(items), measure)


class TestOnNumbers:
    """On evidence that was made."""

    @pytest.mark.parametrize(
        "gate", [(0.0, 4.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0), (-0.7, 2.0, 1.0, -0.5)], ids=str
    )
    def test_finds_the_gate_that_made_them(self, gate: tuple[float, ...]) -> None:
        items = made(200, gate)
        found = fitted(items)
        assert found.numbers == pytest.approx(gate, abs=0.35)
        assert found.helps
        assert found.tokens == 200 * TOKENS
        # No nearby gate makes the items more probable than the one that was found, but for the ridge.
        bits = sum(one.bits(found.numbers) for one in items)
        for i in range(4):
            for step in (-0.3, 0.3):
                other = [number + step * (i == j) for j, number in enumerate(found.numbers)]
                assert sum(one.bits(other) for one in items) > bits

    def test_held_out_is_another_half(self) -> None:
        """What an item counts with is fitted on the items of the other half alone."""
        items = made(40, (0.0, 4.0, 0.0, 0.0))
        found = fitted(items)
        odd, even = fitted(items[1::2]).numbers, fitted(items[::2]).numbers
        assert odd != even
        want = [one.bits((odd, even)[i % 2]) for i, one in enumerate(items)]
        assert found.held_out == pytest.approx(want)
        assert found.without == pytest.approx([one.bits(NO_GATE) for one in items])
        with_gate, without = found.bits_per_byte()
        assert found.difference[0] == pytest.approx(with_gate - without)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_where_gradients_are_off(self, mode: type[torch.no_grad]) -> None:
        """`tune` may be called in such a block, as all that runs models is."""
        gate = (0.0, 4.0, 0.0, 0.0)
        expected = fitted(made(20, gate)).numbers
        with mode():
            assert fitted(made(20, gate)).numbers == expected

    def test_no_gate_where_none_helps(self) -> None:
        """Who knows a token has nothing to do with what is seen: on held-out items a gate only costs."""
        found = [fitted(made(12, NO_GATE, seed)) for seed in range(20)]
        assert all(any(one.numbers) for one in found)  # on the items themselves there is always one
        refused = [one for one in found if not one.helps]
        assert (
            len(refused) >= 17
        )  # of 20 by chance some three lie beyond one standard error, if none were worse
        assert all(one.difference[0] > -one.difference[1] for one in refused)

    def test_confidence_is_what_it_must_beat(self) -> None:
        items = made(200, (-1.0, 0.0, 0.0, 0.0))
        assert fitted(items).helps
        assert not fitted(items, confidence=1.0).helps

    def test_too_few_items_and_silent_assistants(self) -> None:
        assert not fitted(made(1, (0.0, 4.0, 0.0, 0.0))).helps
        found = fitted([GateEvidence.together([], 2)] * 4)
        assert (found.numbers, found.tokens, found.helps) == (NO_GATE, 0, False)

    def test_a_member_that_is_right_where_its_margin_is_high(self) -> None:
        """No number fits that for ever: the ridge keeps it finite, and the gate is all but a switch."""
        (one,) = made(1, NO_GATE)
        high = one.features[:, :, 1] > one.features[:, :, 1].flip(1)
        item = GateEvidence(one.features, one.weights, torch.where(high, 0.9, 0.001).double().log())
        found = fitted([item] * 6)
        assert found.helps
        assert 5 < found.numbers[1] < 500
        assert abs(found.numbers[1]) > 3 * max(abs(found.numbers[i]) for i in (0, 2, 3))


def text_items(tmp_path: Path, limit: int = 16) -> DevSet:
    file = tmp_path / "some.txt"
    file.write_text(PROSE + AWKWARD, encoding="utf-8")
    return DevSet.from_text(file, limit)


@pytest.mark.parametrize("fuser", ["union-vocab", "average"])
def test_evidence_has_the_bits_of_the_ensemble(
    tiny_smollm2: Member, tiny_gemma: Member, tmp_path: Path, fuser: str
) -> None:
    """What the fit takes for the likelihood under a gate is what an ensemble with that gate gives."""
    members = [tiny_gemma, tiny_smollm2]
    gates = (NO_GATE, (-2.0, 1.0, 0.5, -1.0), (3.0, -2.0, -4.0, 2.0))
    weights = [0.3, 0.7]
    for item in text_items(tmp_path, 3).items:
        reading = TextReading(members, item.context, item.text)
        ensembles = [
            Ensemble(members, fuser=fuser, weights=weights, weighing="gate", gate=list(gate))
            for gate in gates
        ]
        evidence = GateEvidence.of(reading, ensembles[0], weights)
        assert 20 < len(evidence.weights) <= len(reading.member(tiny_gemma).logprobs)
        assert evidence.weights.sum(dim=1).tolist() == pytest.approx([1] * len(evidence.weights))
        real = [-reading.fused(one).total / math.log(2) for one in ensembles]
        assert abs(real[1] - real[0]) > 1
        assert abs(real[2] - real[0]) > 1
        for gate, bits in zip(gates[1:], real[1:], strict=True):
            # Tokens at which the main model is alone count the same under all gates.
            more = evidence.bits(gate) - evidence.bits(NO_GATE)
            assert more == pytest.approx(bits - real[0], abs=0.02)


def test_a_gate_of_three_members(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """Members that sit out have no weight, whatever was seen of them."""
    members = [tiny_gemma, tiny_smollm2, tiny_gemma]
    weights = [0.5, 0.3, 0.2]
    ensemble = Ensemble(members, fuser="union-vocab", weights=weights, weighing="gate", gate=[0, 0, 0, 0])
    reading = TextReading(members, PROSE[-200:], AWKWARD)
    evidence = GateEvidence.of(reading, ensemble, weights)
    assert evidence.features.shape == (len(evidence.weights), 3, 4)
    silent = evidence.weights == 0
    assert silent.any()
    assert (evidence.logprobs[silent] == -math.inf).all()
    other = ensemble.variant(gate=[-2, 1, 0.5, -1])
    more = evidence.bits([-2, 1, 0.5, -1]) - evidence.bits(NO_GATE)
    real = reading.fused(ensemble).total - reading.fused(other).total
    # As an assistant tiny Gemma gives some hundredths to special tokens, which count less in the ensemble.
    assert more == pytest.approx(real / math.log(2), rel=0.01)


class TestCommand:
    """`deepen-ext tune --gate`, and the same in Python."""

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["tune", *map(str, arguments)])
        return done.exit_code, " ".join(done.output.split())

    @pytest.fixture
    def folders(self, tiny_smollm2_dir: Path, tiny_gemma_dir: Path) -> list[Path]:
        return [tiny_smollm2_dir, tiny_gemma_dir]

    def test_writes_a_preset_that_generates(self, folders: list[Path], tmp_path: Path) -> None:
        file, out = tmp_path / "some.txt", tmp_path / "preset.yaml"
        file.write_text(
            PROSE[400:1200], encoding="utf-8"
        )  # which one of them has read, and the other has not
        named = [word for one in folders for word in ("--model", one)]
        # No time for more than uniform weights, which make too little of the one that knows the text.
        code, printed = self.run(
            *named, "--text", file, "--fuser", "union-vocab", "--gate", "--minutes", 1e-6, "--out", out
        )
        assert code == 0, printed
        preset = load_preset(out)
        measured = preset.measured["gate"]
        held_out = measured["held_out_bits_per_byte"]
        assert measured["written"], printed
        assert measured["tokens"] > 100
        assert held_out["with"] - held_out["without"] == pytest.approx(measured["difference"], abs=2e-5)
        assert held_out["without"] == pytest.approx(preset.measured["bits_per_byte"]["chosen"])
        assert measured["difference"] < -measured["standard_error"]
        settings = preset.settings()
        assert settings["weighing"] == "gate"
        assert len(settings["gate"]) == 4
        assert "confidence" not in settings
        assert f"Gate {settings['gate']}: {measured['difference']:+.4f} ±" in printed
        ensemble = Ensemble(load_members(preset.members), **settings)
        assert str(ensemble.fuser.rule) == f"gate {settings['gate']}"
        assert ensemble.generate(PROSE[:300], max_new_tokens=12).text
        # Fitted on all of these items, it is better on them than without.
        readings = [
            TextReading(ensemble.members, one.context, one.text) for one in DevSet.from_text(file).items
        ]
        without = ensemble.variant(weighing="confidence", gate=None)
        assert sum(one.fused(ensemble).total for one in readings) > sum(
            one.fused(without).total for one in readings
        )

    def test_no_gate_is_written_where_none_helps(
        self,
        tiny_smollm2: Member,
        tiny_gemma: Member,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        dev = text_items(tmp_path)
        tuning = tune([tiny_smollm2, tiny_gemma], dev, fuser="average", gate=True, minutes=1e-6)
        assert len(tuning.sizes) == 2  # one item to fit on
        assert tuning.gate is not None
        assert tuning.gate.without == tuning.tried[tuning.chosen]
        useless = replace(tuning, gate=replace(tuning.gate, held_out=tuning.gate.without))
        preset = useless.preset(["a", "b"], dev, "average")
        assert "weighing" not in preset.given
        assert "gate" not in preset.given
        assert preset.measured["gate"]["written"] is False
        _show(useless, dev)
        assert "No gate is written: +0.0000 ± 0.0000 bits a byte on items" in capsys.readouterr().out
        assert "gate" not in replace(tuning, gate=None).preset(["a", "b"], dev, "average").measured

    @pytest.mark.parametrize(
        "fuser", [None, "deepen:bytes", "product", "union-topk", "draw", "operator:setitem"]
    )
    def test_refused_before_a_model_is_loaded(self, fuser: str | None, tmp_path: Path) -> None:
        file = tmp_path / "some.txt"
        file.write_text(PROSE, encoding="utf-8")
        named = ["--model", "nowhere/a", "--model", "nowhere/b", "--text", file, "--gate"]
        code, printed = self.run(*named, *([] if fuser is None else ["--fuser", fuser]))
        assert code == 2
        assert "a gate weighs members of an average; use --fuser union-vocab or average" in printed

    def test_refused_in_python(self, tiny_smollm2: Member, tiny_gemma: Member, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a gate weighs members of an average"):
            tune([tiny_smollm2, tiny_gemma], text_items(tmp_path), gate=True)
        for name in ("union-vocab", "average"):
            check_gate_fuser(fuser_class(name))
