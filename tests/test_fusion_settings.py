"""The settings of an ensemble: known by name, checked before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from deepen_ext import Ensemble, InputError
from deepen_ext.fusers import FUSERS, Fuser, FusionSettings, map_settings
from deepen_ext.fusers.weighing.make import RULES
from deepen_ext.fusers.weighing.rule import Rule
from deepen_ext.members.member import Member
from deepen_ext.space.member_maps import MapSettings


def test_every_setting_is_documented() -> None:
    attributes = (FusionSettings.__doc__ or "").partition("Attributes:")[2]
    for one in fields(FusionSettings):
        assert f"\n        {one.name}: " in attributes


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weigths": [0.5, 0.5]}, "weigths: no setting of an ensemble; did you mean weights?"),
    ({"learning_rat": 0.1}, "did you mean learning_rate?"),
    ({"zzz": 1}, "zzz: no setting of an ensemble; there are weights, sharpness, fuser"),
    ({"fuser": "mean"}, "fuser is 'mean'; use one of auto, deepen, average"),
    ({"fuser": 3}, "fuser is 3; use one of auto, deepen, .*, or a function"),
    ({"recipe": "byte"}, "recipe is 'byte'; use one of bytes, calibrated, paper"),
    ({"weights": "equal"}, "weights is 'equal'; give a list of numbers, size or prompt"),
    ({"weights": [0.5, 0.3, 0.2]}, "3 weights for 2 members"),
    ({"weights": [0.5, 0.501]}, "weights sum to 1.001"),
    ({"learning_rate": 11}, "learning_rate is 11; choose above 0 to 10"),
    ({"steps": 65}, "steps is 65; choose 1 to 64"),
    ({"confidence": -1}, "confidence is -1; choose 0 to 10"),
    ({"weighing": "entropy"}, "weighing is 'entropy'; use one of confidence, margin, consistency"),
    ({"weighing": "margin", "confidence": 1}, "confidence goes with weighing='confidence'; leave it out"),
    ({"weighing": "gate"}, "run deepen-ext tune --gate"),
    ({"gate": [0, 0, 0, 0]}, "give weighing='gate' with it, or leave it out for weighing='confidence'"),
    ({"weighing": "gate", "gate": [1, 2]}, "give a list of 4 numbers"),
    ({"weighing": "gate", "gate": [1, 2, 3, 4, 5]}, "give a list of 4 numbers"),
    ({"weighing": "gate", "gate": [1, 2, 3, math.nan]}, "a number of the gate is nan; choose finite"),
    ({"candidates": 0}, "candidates is 0"),
    ({"entries": 0}, "entries is 0"),
    ({"min_probability": 1}, "min_probability is 1"),
    ({"min_probability": 1 - 1e-8}, "min_probability is 0.99999999"),  # 1 as a float
    ({"relative_temperature": 0, "recipe": "calibrated"}, "relative_temperature is 0; choose above 0"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_are_told_before_a_model_is_loaded(settings: dict[str, Any], message: str) -> None:
    """Or the missing models would be what is told."""
    with pytest.raises(InputError, match="no/such"):
        Ensemble.from_pretrained(["no/such/model", "no/where/at/all"])
    with pytest.raises(InputError, match=message):
        Ensemble.from_pretrained(["no/such/model", "no/where/at/all"], **settings)


def test_what_relative_rows_are_made_by() -> None:
    settings = FusionSettings(
        fuser="deepen", recipe="calibrated", relative_temperature=20, entries=8, cache=False
    )
    assert map_settings(settings) == MapSettings("calibrated", 20, 8, False)
    assert map_settings(settings.changed(fuser="average")) == MapSettings("bytes", None, 8, False)
    assert map_settings(settings.changed(fuser="union-topk")) is None
    assert map_settings(settings.changed(fuser=print)) is None


def test_a_new_fuser_is_one_class(
    tiny_smollm2: Member, tiny_gemma: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Favourite(Fuser):
        """Always writes token 7."""

        name = "favourite"

        def fuse(self, logits, said, weights):
            logits[:, 7] = 1000.0
            return logits.argmax(dim=-1).int()

    monkeypatch.setitem(FUSERS, Favourite.name, Favourite)
    ensemble = Ensemble([tiny_smollm2, tiny_gemma], fuser="favourite", confidence=0.5)
    assert (ensemble.method, ensemble.fuser.weighing, ensemble.maps) == ("favourite", "confidence 0.5", [])
    logits = [torch.randn(2, member.vocab_size) for member in (tiny_smollm2, tiny_gemma)]
    assert ensemble.fuser.step(logits, [0.5, 0.5]).chosen.tolist() == [7, 7]
    with pytest.raises(InputError, match="two or more members, not 1"):
        Ensemble([tiny_smollm2], fuser="favourite")


def test_a_new_rule_of_weighing_is_one_class(
    tiny_smollm2: Member, tiny_gemma: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Last(Rule):
        """All weight to the last member."""

        name = "last"

        def weigh(self, weights, said):
            return torch.eye(weights.shape[1])[-1].expand_as(weights)

    monkeypatch.setitem(RULES, Last.name, Last)
    ensemble = Ensemble([tiny_smollm2, tiny_gemma], fuser="union-vocab", weighing="last")
    assert isinstance(ensemble.fuser.rule, Last)
    logits = [torch.randn(2, member.vocab_size) for member in (tiny_smollm2, tiny_gemma)]
    assert ensemble.fuser.step(logits, [0.5, 0.5]).shares == [(0, 1), (0, 1)]
    with pytest.raises(InputError, match="leave it out for weighing='last'"):
        ensemble.variant(confidence=1)
