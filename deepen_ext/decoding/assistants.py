"""The assistants' side of a batch of texts: what they have read, who takes part in a step, the fusion.

There is no loop here. What the main model says comes from outside, from `loop.Run` or from transformers' own
`generate` (`adapters.DeepenLogitsProcessor`), and so do the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import candidates_of
from deepen_ext.decoding.prompt_weights import PromptScore, read_prompts
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session
from deepen_ext.decoding.team import Team
from deepen_ext.fusers import FusedStep, Part
from deepen_ext.members.backend import Session
from deepen_ext.members.chat import PromptText

# Why no assistant was asked about a text's token; None where they were.
Reason = Literal["settled", "gated", "unfinished character", "boundary"]


@dataclass
class AssistedStep:
    """What a step gave for its texts, and the assistants' share of its time."""

    fused: FusedStep  # its rows are the texts of the step, in order
    reasons: list[Reason | None]  # of each of them
    members_ms: dict[str, float]  # forward passes, by assistant
    handoff_ms: float  # re-tokenisation


class Assistants:
    """B texts as the assistants of a team have them, named by their number 0..B-1.

    Each text that is being written has a lane of every session; a text that waits gets the lane of one that
    ended.

    Attributes:
        texts: by number.
        lanes: of each text that is written, its lane; it has the same one in the main model's session.
        weights: of each text, one for each member.
    """

    def __init__(
        self,
        team: Team,
        prompts: Sequence[Sequence[PromptText]],
        *,
        lanes: int | None = None,
        new_tokens: int = 0,
        shared: SharedForwards | None = None,
    ) -> None:
        """Encode the prompts; `open` comes before the first `step`.

        Args:
            team: whose members 1.. these are.
            prompts: of each text, its beginning as each assistant reads it.
            lanes: how many texts, the first ones, are written at once; None for all.
            new_tokens: how many tokens a text may grow by, as far as is known.
            shared: forwards to share with other runs.
        """
        self._team = team
        self._members = team.members[1:]
        self.texts = [AssistantsText(self._members, own) for own in prompts]
        self.lanes = {text: text for text in range(len(prompts) if lanes is None else lanes)}
        self._new_tokens = new_tokens
        self._shared = shared
        self._sessions: list[Session] = []
        self.weights: list[Sequence[float]] = [team.weights] * len(prompts)

    def open(self) -> None:
        """Make the sessions. On CUDA they take over the buffers of earlier ones."""
        self._sessions = [
            open_session(
                member,
                len(self.lanes),
                max(len(text.ids(i)) for text in self.texts) + self._new_tokens,
                self._shared,
            )
            for i, member in enumerate(self._members)
        ]

    def read_prompts(self, texts: Sequence[int]) -> list[list[PromptScore]]:
        """How well each assistant reads these texts' prompts; their sessions then hold the prompts."""
        found = []
        for i, (session, member) in enumerate(zip(self._sessions, self._members, strict=True)):
            ids = {self.lanes[text]: self.texts[text].ids(i) for text in texts}
            found.append(list(read_prompts(session, member, ids).values()))
        return found

    def close(self) -> None:
        """Free all caches."""
        for session in self._sessions:
            session.close()

    def release(self, text: int, following: int | None = None) -> None:
        """This text has ended; `following` gets its lane, if one waits."""
        lane = self.lanes.pop(text)
        if following is not None:
            self.lanes[following] = lane
            return
        for session in self._sessions:
            session.release(lane)

    def reorder(self, sources: Sequence[int]) -> None:
        """Text b goes on from what text `sources[b]` was (beam search).

        Its lane keeps what the two have in common; the rest is fed again.
        """
        self.texts = [self.texts[source].copy() for source in sources]

    def restart(self, text: int, prompts: Sequence[PromptText]) -> None:
        """The text is another now; its lane keeps what the two begin with."""
        self.texts[text] = AssistantsText(self._members, prompts)

    def step(
        self, main: Part, texts: Sequence[int], *, unneeded: Sequence[Reason | None] | None = None
    ) -> AssistedStep:
        """Fuse what the assistants say into what the main model says. All are asked, then all are waited for.

        Args:
            main: `team.fuser.part(0, ...)` of the next token of these texts.
            texts: their numbers, one for each row of the step.
            unneeded: of each of them, why its token needs no assistant, or None.

        Raises:
            InputError: a member that gives NaN; a text longer than an assistant's context.
            ModelError: an assistant's forward pass failed.
        """
        reasons: list[Reason | None] = [None] * len(texts) if unneeded is None else list(unneeded)
        for row, text in enumerate(texts):
            if reasons[row] is None and self.texts[text].unfinished:
                reasons[row] = "unfinished character"
        open_rows = [row for row, reason in enumerate(reasons) if reason is None]
        fuser, rule = self._team.fuser, self._team.boundary_rule
        candidates = candidates_of(main.topk, open_rows) if rule is not None and open_rows else {}
        members_ms = dict.fromkeys(self._team.names[1:], 0.0)
        handoff = 0.0
        asked = []
        for i, (session, name) in enumerate(zip(self._sessions, members_ms, strict=True)):
            began = perf_counter()
            rows = [
                row for row in open_rows if self.texts[texts[row]].speaks(i, rule, candidates.get(row, ()))
            ]
            targets = {self.lanes[texts[row]]: self.texts[texts[row]].ids(i) for row in rows}
            read = perf_counter()
            if targets:
                asked.append((i, session.ask(targets, fuser.candidates), rows))
            handoff += read - began
            members_ms[name] += (perf_counter() - read) * 1e3
        said = []
        for i, answer, rows in asked:
            began = perf_counter()
            said.append((i + 1, answer.wait(), rows))
            members_ms[self._team.names[i + 1]] += (perf_counter() - began) * 1e3
        heard = {row for _, _, rows in said for row in rows}
        for row in open_rows if self._sessions else ():
            if row not in heard:
                reasons[row] = "boundary"
        weights = [self.weights[text] for text in texts]
        fused = fuser.step_parts([main, *fuser.parts(said)], weights)
        return AssistedStep(fused, reasons, members_ms, handoff * 1e3)
