"""The assistants' side of a batch of texts: what they have read, who takes part in a step, the fusion.

There is no loop here. The main model's logits come from outside, from `decoding.Run` or from transformers'
own `generate` (`adapters.DeepenLogitsProcessor`), and so do the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from deepen_ext.decoding.boundary import candidates_of
from deepen_ext.decoding.shared_forwards import Session, SharedForwards, open_session
from deepen_ext.decoding.team import Team
from deepen_ext.errors import failures_of
from deepen_ext.fusers import FusedStep, Part
from deepen_ext.fusers.weights import PromptScore, read_prompts
from deepen_ext.members.chat import PromptText
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText

# Why no assistant was asked about a row's token; None where they were.
Reason = Literal["settled", "gated", "unfinished character", "boundary"]


@dataclass
class AssistedStep:
    """What a step gave for its rows, and the assistants' share of its time."""

    fused: FusedStep  # rows 0.. of the step
    reasons: list[Reason | None]  # of each row
    members_ms: dict[str, float]  # forward passes, by assistant
    handoff_ms: float  # re-tokenisation


class Assistants:
    """B texts as the assistants of an ensemble have them. Rows are named by their number, 0..B-1.

    Each row that is written has a place, a row of the sessions; one that waits gets it from one that ended.
    """

    def __init__(
        self,
        team: Team,
        texts: Sequence[Sequence[PromptText]],
        *,
        places: int | None = None,
        new_tokens: int = 0,
        shared: SharedForwards | None = None,
    ) -> None:
        """Encode the prompts; `open` comes before the first `step`.

        Args:
            team: whose members 1.. these are.
            texts: of each row, the prompt as each assistant reads it.
            places: so many of the rows, the first ones, are written at once; None for all.
            new_tokens: how many tokens a row may grow by, as far as is known.
            shared: forwards to share with other runs.
        """
        self._team = team
        self._members = team.members[1:]
        self._texts = [self._begun(own) for own in texts]
        self._unread = [[""] * len(self._members) for _ in texts]
        self._bytes = [[len(one.text.encode()) for one in own] for own in texts]
        self._characters = [Utf8Stream() for _ in texts]
        # Of each row that is written, the sessions' row; the main model's session has the same.
        self.places = {row: row for row in range(len(texts) if places is None else places)}
        self._new_tokens = new_tokens
        self._shared = shared
        self._sessions: list[Session] = []
        self.weights: list[Sequence[float]] = [team.weights] * len(texts)  # of each row

    def open(self) -> None:
        """Make the sessions. On CUDA they take over the buffers of earlier ones."""
        self._sessions = [
            open_session(
                member,
                len(self.places),
                max(len(own[i].ids) for own in self._texts) + self._new_tokens,
                self._shared,
            )
            for i, member in enumerate(self._members)
        ]

    def read_prompts(self, rows: Sequence[int]) -> list[list[PromptScore]]:
        """How well each assistant reads these rows' prompts; their sessions then hold the prompts."""
        found = []
        for i, (session, member) in enumerate(zip(self._sessions, self._members, strict=True)):
            ids = {self.places[row]: self._texts[row][i].ids for row in rows}
            found.append(list(read_prompts(session, member, ids).values()))
        return found

    def close(self) -> None:
        """Free all caches."""
        for session in self._sessions:
            session.close()

    def release(self, row: int, following: int | None = None) -> None:
        """This row's text has ended; `following` gets its place, if one waits."""
        place = self.places.pop(row)
        if following is not None:
            self.places[following] = place
            return
        for session in self._sessions:
            session.release(place)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row b goes on from what row `sources[b]` was (beam search).

        Its cache keeps what the two have in common; the rest is fed again.
        """
        self._texts = [[text.copy() for text in self._texts[source]] for source in sources]
        self._unread = [list(self._unread[source]) for source in sources]
        self._bytes = [list(self._bytes[source]) for source in sources]
        self._characters = [self._characters[source].copy() for source in sources]

    def restart(self, row: int, texts: Sequence[PromptText]) -> None:
        """The row's text is another now; its cache keeps what the two begin with."""
        self._texts[row] = self._begun(texts)
        self._unread[row] = [""] * len(self._members)
        self._bytes[row] = [len(one.text.encode()) for one in texts]
        self._characters[row] = Utf8Stream()

    def _begun(self, texts: Sequence[PromptText]) -> list[GrowingText]:
        return [
            GrowingText(member.vocabulary, one.text, prefix=one.prefix)
            for member, one in zip(self._members, texts, strict=True)
        ]

    def append(self, row: int, data: bytes) -> str:
        """Add a token's bytes to a row's text; returns the characters they complete."""
        piece = self._characters[row].feed(data)
        if piece:
            size = len(piece.encode())
            for i in range(len(self._members)):
                self._unread[row][i] += piece
                self._bytes[row][i] += size
        return piece

    def finish(self, row: int) -> str:
        """The row's text has ended: what an unfinished character leaves."""
        return self._characters[row].finish()

    def tokens(self, row: int) -> list[int]:
        """How many tokens the row's text has for each assistant."""
        return [len(self._text(row, i).ids) for i in range(len(self._members))]

    def fits(self, row: int) -> bool:
        """Whether every assistant can read the row's text so far."""
        return all(self._fits(row, i) for i in range(len(self._members)))

    def _fits(self, row: int, i: int) -> bool:
        limit = self._members[i].context_length
        # A text of fewer bytes has fewer tokens (but for a dummy space): no need to encode what is unread.
        most = self._bytes[row][i] + len(self._members[i].vocabulary.prefix_ids) + 1
        return limit is None or most <= limit or len(self._text(row, i).ids) <= limit

    def step(
        self,
        main_logits: torch.Tensor,
        rows: Sequence[int],
        *,
        main: Part | None = None,
        unneeded: Sequence[Reason | None] | None = None,
    ) -> AssistedStep:
        """Fuse what the assistants say into the main model's logits.

        Args:
            main_logits: [b, V_main], of the next token of these rows.
            rows: their b numbers.
            main: `team.fuser.top(0, main_logits)`, where it is known already.
            unneeded: of each row, why its token needs no assistant, or None.

        Raises:
            InputError: a member that gives NaN; a text longer than an assistant's context.
            ModelError: an assistant's forward pass failed.
        """
        reasons: list[Reason | None] = [None] * len(rows) if unneeded is None else list(unneeded)
        for i, row in enumerate(rows):
            if reasons[i] is None and self._characters[row].pending:
                reasons[i] = "unfinished character"
        open_rows = [i for i, reason in enumerate(reasons) if reason is None]
        fuser, rule = self._team.fuser, self._team.boundary_rule
        if main is None:
            main = fuser.top(0, main_logits)
        candidates = candidates_of(main.topk, open_rows) if rule is not None and open_rows else {}
        members_ms: dict[str, float] = {}
        handoff = 0.0
        logits: list[torch.Tensor | None] = [main_logits]
        speaks: list[list[int] | None] = [None]
        for i, session in enumerate(self._sessions):
            name = self._team.names[i + 1]
            began = perf_counter()
            texts = {k: self._text(rows[k], i) for k in open_rows}
            if rule is not None:
                texts = {k: text for k, text in texts.items() if not rule.sits_out(text, candidates[k])}
            targets = {self.places[rows[k]]: text.ids for k, text in texts.items()}
            speaks.append(list(texts))
            read = perf_counter()
            logits.append(forward(session, targets, name) if targets else None)
            handoff += read - began
            members_ms[name] = (perf_counter() - read) * 1e3
        for k in open_rows if self._sessions else ():
            if not any(k in own for own in speaks[1:] if own is not None):
                reasons[k] = "boundary"
        fused = fuser.step(logits, [self.weights[row] for row in rows], rows=speaks, main=main)
        return AssistedStep(fused, reasons, members_ms, handoff * 1e3)

    def _text(self, row: int, i: int) -> GrowingText:
        """The row's text as assistant i reads it, brought up to date."""
        text = self._texts[row][i]
        if unread := self._unread[row][i]:
            text.append(unread)
            self._unread[row][i] = ""
        return text


def forward(session: Session, targets: dict[int, list[int]], name: str) -> torch.Tensor:
    """`session.sync(targets)`; where it fails, the error names the member.

    Raises:
        InputError: see `BatchSession.sync`.
        ModelError: the forward pass failed.
    """
    with failures_of(name):
        return session.sync(targets)
