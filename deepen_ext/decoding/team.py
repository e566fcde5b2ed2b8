"""Who writes a text together, and by which rules: what the loop, its trace and the adapters need to know."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from deepen_ext.decoding.boundary import BoundaryRule
from deepen_ext.decoding.observed.history import History
from deepen_ext.errors import InputError
from deepen_ext.fusers import Fuser
from deepen_ext.fusers.settings import OnFailure
from deepen_ext.fusers.weights import WeightsRule
from deepen_ext.members.member import Member
from deepen_ext.space.member_maps import MemberMaps


@dataclass(frozen=True, eq=False)
class Team:
    """The members of an ensemble and how they are fused; made once, never changed.

    Attributes:
        members: the main model first.
        names: the members', no two alike.
        fuser: makes new logits of what they say.
        method: what tables and records call the fuser.
        weights: lambda_i, summing to 1.
        weights_rule: these weights are where `prompt_weights` starts from, for each prompt; None where they
            are given.
        sharpness: of these weights.
        boundary_rule: when an assistant sits out; None for never.
        on_failure: what a run does when a member is lost (see `lost`).
        maps: the members' relative maps. A fuser that has none may have those of another team, kept for a
            later variant (see `make_team`), or None.
        told: of whom `tell_of_unequal` has warned, and of what.
        histories: what runs found out about drafts, by whether they sampled.
    """

    members: tuple[Member, ...]
    names: tuple[str, ...]
    fuser: Fuser
    method: str
    weights: tuple[float, ...]
    weights_rule: WeightsRule | None
    sharpness: float
    boundary_rule: BoundaryRule | None
    on_failure: OnFailure
    maps: MemberMaps | None
    told: set[tuple[str, str]] = field(default_factory=set)
    histories: dict[bool, History] = field(default_factory=lambda: {False: History(), True: History()})

    @property
    def weighs_prompts(self) -> bool:
        """Whether the weights are found for each prompt."""
        return self.weights_rule is not None

    @property
    def main(self) -> Member:
        """The main model."""
        return self.members[0]

    @cached_property
    def backends(self) -> list[str]:
        """What computes each member, for readers."""
        return [member.backend.describe().backend for member in self.members]

    @property
    def device(self) -> torch.device:
        """Where the fusion runs: the main model's."""
        return self.main.device

    def require_stop(self, why: str) -> None:
        """Refuse a team that goes on without an assistant that is lost.

        Args:
            why: what that would do where it is refused.

        Raises:
            InputError: on_failure is "continue".
        """
        require_stop(self.on_failure, why)

    def save_rows(self) -> None:
        """Write newly computed relative rows to the cache folder, for the next run."""
        if self.maps is not None:
            self.maps.save()


def require_stop(on_failure: OnFailure, why: str) -> None:
    """The same of a team that is not made yet: see `Team.require_stop`."""
    if on_failure == "continue":
        raise InputError(f"on_failure='continue' cannot be used here: {why}; use on_failure='stop'")
