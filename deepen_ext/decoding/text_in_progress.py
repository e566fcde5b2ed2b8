"""A text while it is being written, and what one step adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deepen_ext.decoding.generation import FinishReason, Generation, Timings


@dataclass(frozen=True)
class Written:
    """A token that was written, and the characters it completed ("" while one is unfinished)."""

    number: int  # of its text in the batch
    token: int
    text: str


@dataclass
class TextInProgress:
    """One text of a run."""

    ids: list[int]  # the main model's: prompt and what was chosen; only assistants re-tokenise
    prompt_length: int
    new_tokens: int  # at most so many
    pieces: list[str] = field(default_factory=list)
    recent: str = ""  # the end of the new text with special tokens' names, for stop strings
    changed: int = 0  # tokens that are not the main model's own first choice
    rest: str = ""  # what an unfinished character left, at the end
    finish_reason: FinishReason | None = None
    lost: dict[str, int] = field(default_factory=dict)  # by member: new tokens before it was lost

    @property
    def written(self) -> int:
        """Number of new tokens."""
        return len(self.ids) - self.prompt_length

    def result(self, timings: Timings, backends: Sequence[str]) -> Generation:
        """What was written so far, and what computed the members; "cancelled" while the text has no end."""
        return Generation(
            text="".join(self.pieces),
            token_ids=self.ids[self.prompt_length :],
            finish_reason=self.finish_reason or "cancelled",
            changed_tokens=self.changed,
            timings=timings,
            backends=list(backends),
            lost={name: tokens for name, tokens in self.lost.items() if tokens < self.written},
        )
