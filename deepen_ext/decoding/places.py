"""The places of a draft: tokens that are to be written, each with who has a say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.members.distribution import Distribution

# Why no assistant was asked about a text's token; None where they were.
Reason = Literal[
    "settled", "gated", "unfinished character", "boundary", "sure", "main model drawn", "no weight", "lost"
]


@dataclass(eq=False)
class Place:
    """Where a text's next token goes, and the assistants that are to speak of it.

    Attributes:
        text: the text's number.
        reason: why no assistant is asked; None where some are, and where the team has none.
        asked: the assistants that are to speak, with the ids each has for the text up to here.
        weights: one for each member, the main model first.
        known: what some of these have said of this place already, a `Distribution` of one position each.
    """

    text: int
    reason: Reason | None
    asked: Mapping[int, Sequence[int]]
    weights: Sequence[float]
    known: dict[int, Distribution] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether an assistant may still change the token: it has to be verified."""
        return bool(self.asked)


@dataclass(eq=False)
class Proposal:
    """A token that a draft has at a place.

    Attributes:
        place: where.
        token: what the draft has there: what the main model would write (its most probable token where nobody
            looks at this), or what an assistant wrote that counts more in this text.
        margin: by how much the main model's first choice there is more probable than its second.
        main: what the main model says there is row `row` of this.
        row: see `main`.
        before: the text up to the place, as the assistants read it.
        offered: the token that another drafter had here.
        own: what the main model would write, where `token` is an assistant's; None where it is `token`.
        piece: the characters that the token completes; None where the draft did not go on with it.
    """

    place: Place
    token: int
    margin: float
    main: Distribution
    row: int
    before: AssistantsText
    offered: int | None = None
    own: int | None = None
    piece: str | None = None

    def go_on(self, data: bytes) -> AssistantsText:
        """The text before the next place of the draft: with the token's bytes, as other members read them."""
        text = self.before.copy()
        self.piece = text.append(data)
        return text


Draft = list[Proposal]  # of one text, in the order of its places


@dataclass(eq=False)
class Ahead:
    """The drafts of one cycle.

    Attributes:
        drafts: of each text, by its number.
        drafter: who wrote them (see `drafts.draft_settings`).
        decided: the tokens are to be written as they are; nobody verifies them.
        drafted: how many tokens were written ahead, or offered.
        members_ms: what forward passes took while the drafts were written, by member index.
        handoff_ms: what re-tokenisation took.
        looked_up: what prompt lookup had for each text, whoever wrote.
    """

    drafts: dict[int, Draft]
    drafter: int
    decided: bool = False
    drafted: int = 0
    members_ms: dict[int, float] = field(default_factory=dict)
    handoff_ms: float = 0.0
    looked_up: dict[int, list[int]] = field(default_factory=dict)

    def add_ms(self, member: int, ms: float) -> None:
        """A member's forward passes took so many milliseconds more."""
        self.members_ms[member] = self.members_ms.get(member, 0.0) + ms
