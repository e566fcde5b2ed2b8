"""What fusers ask of the members' backends: refused by name, over backends that compute nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers import FUSERS, FusionSettings, fuser_class
from deepen_ext.fusers.capabilities import check_capabilities
from deepen_ext.members.backend import Backend, Capabilities
from deepen_ext.space.recipes import RECIPES


@dataclass
class Facts:
    """What `check_capabilities` looks at of a backend."""

    name: str
    logits: bool = True
    capabilities: Capabilities = field(init=False)

    def __post_init__(self) -> None:
        self.capabilities = Capabilities(logits=self.logits, max_topk=None, repeatable=True)


def check(*backends: Facts, **settings: Any) -> None:
    chosen = FusionSettings(**{"fuser": "deepen", **settings})
    check_capabilities(cast("list[Backend]", list(backends)), fuser_class(chosen.fuser), chosen)


def refused(message: str, *backends: Facts, **settings: Any) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check(*backends, **settings)


def keep(logits: torch.Tensor, said: object, weights: object) -> torch.Tensor:
    return logits


FULL, SERVER = Facts("main"), Facts("server", logits=False)


@pytest.mark.parametrize("fuser", [*FUSERS, keep])
@pytest.mark.parametrize("recipe", RECIPES)
def test_members_in_process_can_do_everything(fuser: Any, recipe: Any) -> None:
    check(FULL, Facts("assistant"), fuser=fuser, recipe=recipe, weights="prompt")


@pytest.mark.parametrize("fuser", ["deepen", "average"])
def test_an_assistants_top_k_is_enough_in_relative_space(fuser: str) -> None:
    check(FULL, SERVER, fuser=fuser)


@pytest.mark.parametrize(
    ("fuser", "named"),
    [
        ("union-topk", "fuser='union-topk'"),
        ("union-vocab", "fuser='union-vocab'"),
        (keep, "a function as fuser"),
    ],
)
def test_other_fusers_need_the_assistants_logits(fuser: Any, named: str) -> None:
    message = f"server: {named} needs a member with the capability 'logits'"
    refused(message, FULL, SERVER, fuser=fuser)
    refused(message, FULL, Facts("assistant"), SERVER, fuser=fuser)


@pytest.mark.parametrize("fuser", [*FUSERS, keep])
def test_a_main_model_with_its_top_k_alone(fuser: Any) -> None:
    if fuser in ("deepen", "single"):
        check(SERVER, FULL, fuser=fuser)
    else:
        refused("server: ", SERVER, FULL, fuser=fuser)


@pytest.mark.parametrize("rule", ["prompt", "size"])
@pytest.mark.parametrize("members", [(FULL, SERVER), (SERVER, FULL)])
def test_weights_by_the_prompt_need_everyones_logits(members: tuple[Facts, Facts], rule: Any) -> None:
    refused(f"server: weights='{rule}' needs", *members, weights=rule)
    check(SERVER, fuser="single", weights=rule)  # which a member alone does not use
