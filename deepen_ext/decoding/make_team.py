"""From members and settings to a team that can write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepen_ext.decoding.boundary import BoundaryRule
from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError
from deepen_ext.fusers import FusionSettings, Ingredients, fuser_class, map_settings, method_name
from deepen_ext.fusers.capabilities import check_capabilities
from deepen_ext.fusers.weights import main_by_size, weights_by_size
from deepen_ext.ground.warning import warn
from deepen_ext.members.member import Member, unique_names
from deepen_ext.ops.checks import check_built_for
from deepen_ext.space.member_maps import MemberMaps


def make_team(members: Sequence[Member], settings: FusionSettings, maps: MemberMaps | None = None) -> Team:
    """The team of these members, or of those among them that the fuser uses.

    Args:
        members: the main model first.
        settings: the ensemble's.
        maps: relative maps of another team, used where they are of the same members by the same settings. A
            fuser without maps keeps them for a later team.

    Raises:
        InputError: see `Ensemble`.
    """
    check_loaded(members)
    settings = settings.resolved(all(one.backend.capabilities.logits for one in members))
    weights = team_weights(settings, len(members))
    members = members[: len(weights)]
    for member in members:
        check_built_for(member.device)
    kind = fuser_class(settings.fuser)
    check_capabilities([member.backend for member in members], kind, settings)
    if settings.weights_rule == "size" and len(members) > 1:
        weights = _weights_by_size(members)
    rows = map_settings(settings)
    if rows is not None and (maps is None or not maps.made_with(members, rows)):
        maps = MemberMaps(members, rows)
    names = unique_names(members)
    assisted = len(members) > 1
    bounded = settings.boundary_aware and assisted
    return Team(
        members=tuple(members),
        names=tuple(names),
        fuser=kind.make(Ingredients(members, names, None if rows is None else maps, settings)),
        method=method_name(settings.fuser, settings.recipe),
        weights=tuple(weights),
        weights_rule=settings.weights_rule if assisted else None,
        sharpness=settings.sharpness,
        boundary_rule=BoundaryRule(members[0].vocabulary) if bounded else None,
        on_failure=settings.on_failure,
        maps=maps,
    )


def main_first(members: Sequence[Member], given: Mapping[str, Any]) -> list[Member]:
    """The members with the main model first, where a caller has named members and no more.

    By default the larger member leads a text. As an assistant it could only say which of a smaller main
    model's tokens to take, and would count less where its own last token may be unfinished. So it becomes the
    main model (`main_by_size`). Who names a fuser or weights says by the order who is the main model.

    Args:
        members: in the order in which they were named.
        given: the settings that `Ensemble` gets beside them.
    """
    settings = FusionSettings().changed(**given)
    chosen = settings.fuser != "auto" or settings.weights is not None
    if chosen or not all(member.backend.capabilities.logits for member in members):
        return list(members)
    main = main_by_size([member.size for member in members])
    return [members[main], *members[:main], *members[main + 1 :]]


def check_loaded(members: Sequence[Member]) -> None:
    """Refuse names of models in the place of models, and one model in the place of a list.

    Raises:
        InputError: see above.
    """
    if isinstance(members, Member):
        raise InputError(f"members is {members.name}, one member; give a list, the main model first")
    for one in members if isinstance(members, Sequence) else [members]:
        if not isinstance(one, Member):
            raise InputError(
                f"{one!r} is no loaded member; Ensemble.from_pretrained([...]) and load_members([...]) load "
                "models by their names"
            )


def _weights_by_size(members: Sequence[Member]) -> list[float]:
    """See `weights_by_size`; a warning says where a size is not known."""
    sizes = [member.size for member in members]
    if unknown := [one.name for one, size in zip(members, sizes, strict=True) if not size]:
        warn(
            f"the size of {', '.join(unknown)} is not known, so all members start from equal weights; "
            "weights='prompt' asks for that without this warning, or give weights=[...]"
        )
    return weights_by_size(sizes)


def team_weights(settings: FusionSettings, members: int, advice: str = "") -> list[float]:
    """The weights of so many members, or of those among them that the fuser uses. Needs no model.

    Args:
        settings: the ensemble's.
        members: how many there are.
        advice: for too few of them.

    Raises:
        InputError: an unknown fuser, too few members for it, or weights that do not go with them.
    """
    settings = settings.resolved(logits=True)
    fewest = fuser_class(settings.fuser).fewest_members
    if members < fewest:
        raise InputError(f"an ensemble needs two or more members, not {members}{advice}")
    return [1.0] if fewest == 1 else settings.member_weights(members)
