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
    def read(cls, team: Team, draft: Literal["auto"] | int | None, drafter: str) -> DraftSettings:
        """Check `draft` and `drafter` of `Ensemble.start`.

        Raises:
            InputError: a length out of range; nobody of that name.
        """
        if draft is None:
            repeatable = all(member.backend.capabilities.repeatable for member in team.members)
            draft = "auto" if repeatable else 0
        if draft == "auto":
            length = None
        elif isinstance(draft, str):
            raise InputError(f"draft is {draft!r}; give 'auto', 0 for no drafts, or a number of tokens")
        else:
            length = whole_number("draft (or give 'auto')", draft, 0, LONGEST)
        return cls(length, _drafters(team.names, length, drafter))


def _drafters(names: Sequence[str], length: int | None, drafter: str) -> tuple[int, ...]:
    if drafter == "auto":
        return (MAIN,) if length is not None else (MAIN, LOOKUP, *range(1, len(names)))
    if drafter == "main":
        return (MAIN,)
    if drafter == "lookup":
        return (LOOKUP,)
    if drafter in names:
        return (names.index(drafter),)
    raise InputError(
        f"drafter is {drafter!r}; give 'auto', 'main', 'lookup' or a member's name: {', '.join(names)}"
    )
