"""How a run drafts: how far, and who writes the drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number

LONGEST = 32  # tokens of a draft that have to be verified

# 0 for the main model, -1 for prompt lookup, i for member i.
MAIN, LOOKUP = 0, -1


@dataclass(frozen=True)
class DraftSettings:
    """What a call asks of drafts.

    Attributes:
        length: how many tokens to be verified are written ahead; None for as many as pay, by measurement.
        drafters: who may write a draft: `MAIN`, `LOOKUP`, or a member index.
    """

    length: int | None
    drafters: tuple[int, ...]

    @classmethod
    def read(cls, team: Team, draft: Literal["auto"] | int | str | None, drafter: str) -> DraftSettings:
        """Check `draft` and `drafter` of `Ensemble.start`.

        Raises:
            InputError: a length out of range; nobody of that name; drafts of a fuser that writes words.
        """
        if team.fuser.spans:
            if draft not in (None, 0, "0"):
                raise InputError(f"fuser='{team.method}' writes words, and has no drafts beside; set draft=0")
            draft = 0
        if draft is None:
            repeatable = all(member.backend.capabilities.repeatable for member in team.members)
            draft = "auto" if repeatable else 0
        length = draft_length(draft)
        return cls(length, _drafters(team.names, length, drafter))


def draft_length(draft: Literal["auto"] | int | str) -> int | None:
    """How many tokens are to be written ahead; None for "auto". A text may be a number.

    Raises:
        InputError: neither "auto" nor a number, or out of range.
    """
    if draft == "auto":
        return None
    if isinstance(draft, str):
        if not draft.isdecimal():
            raise InputError(f"draft is {draft!r}; give 'auto', 0 for no drafts, or a number of tokens")
        draft = int(draft)
    return whole_number("draft (or give 'auto')", draft, 0, LONGEST)


def _drafters(names: Sequence[str], length: int | None, drafter: str) -> tuple[int, ...]:
    alone = len(names) == 1
    if drafter == "auto":
        if length is None:
            return (MAIN, LOOKUP, *range(1, len(names)))
        return (LOOKUP,) if alone else (MAIN,)
    if drafter == "lookup":
        return (LOOKUP,)
    if drafter != "main" and drafter not in names:
        raise InputError(
            f"drafter is {drafter!r}; give 'auto', 'main', 'lookup' or a member's name: {', '.join(names)}"
        )
    if alone and length != 0:
        raise InputError(
            f"drafter is {drafter!r}, and {names[0]} writes alone: a draft of its own saves no forward pass; "
            "give 'lookup' or 'auto'"
        )
    return (MAIN,) if drafter == "main" else (names.index(drafter),)
