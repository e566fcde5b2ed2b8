"""What a fuser is made of: the members of an ensemble, their relative maps, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.settings import FusionSettings
from deepen_ext.fusers.weighing.make import RULES
from deepen_ext.fusers.weighing.rule import Rule, RuleIngredients
from deepen_ext.members.member import Member
from deepen_ext.space.member_maps import MemberMaps


class Common(TypedDict, total=False):
    """Keywords that every fuser takes (see `Fuser`)."""

    candidates: int
    rule: Rule | None
    names: Sequence[str] | None


@dataclass(frozen=True)
class Ingredients:
    """What an ensemble knows.

    Attributes:
        members: the main model first.
        names: the members', no two alike.
        maps: the members' relative maps; None where the fuser has no use for maps.
        settings: the ensemble's.
    """

    members: Sequence[Member]
    names: Sequence[str]
    maps: MemberMaps | None
    settings: FusionSettings

    @property
    def relative_maps(self) -> MemberMaps:
        """The maps, for a fuser that uses them."""
        assert self.maps is not None
        return self.maps

    @property
    def vocab_sizes(self) -> list[int]:
        """V_i of each member."""
        return [member.vocab_size for member in self.members]

    @property
    def device(self) -> torch.device:
        """Where the fusion runs: the main model's."""
        return self.members[0].device

    @property
    def common(self) -> Common:
        """What every fuser takes, from the settings."""
        settings = self.settings
        return {
            "candidates": settings.candidates,
            "rule": RULES[settings.weighing].make(
                RuleIngredients(settings.confidence, settings.gate, self.bridge)
            ),
            "names": self.names,
        }

    def bridge(self) -> TokenBridge:
        """Looks tokens up in other members' vocabularies."""
        return TokenBridge(
            [member.vocabulary for member in self.members], [member.eos_ids for member in self.members]
        )
