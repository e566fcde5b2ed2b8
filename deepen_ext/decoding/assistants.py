"""The assistants' side of a batch of texts: what they have read, who takes part in a step, the fusion.

There is no loop here. What the main model says comes from outside, from `loop.Run` or from transformers' own
`generate` (`adapters.DeepenLogitsProcessor`), and so do the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import NamedTuple

from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import candidates_of
from deepen_ext.decoding.places import Place, Reason
from deepen_ext.decoding.prompt_weights import PromptScore, read_prompts
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session
from deepen_ext.decoding.team import Team
from deepen_ext.fusers import FusedStep, Part
from deepen_ext.members.backend import Session
from deepen_ext.members.chat import PromptText
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.ops.topk_softmax import TopK


@dataclass
class AssistedStep:
    """What a step gave for its places, and the assistants' share of its time."""

    fused: FusedStep  # its batch rows are the places of the step, in order
    members_ms: dict[str, float]  # forward passes, by assistant


class _Question(NamedTuple):
    """One call of an assistant's session, and the batch rows that its answer has something for."""

    targets: dict[int, Sequence[int]]  # ids by lane
    positions: dict[int, int]  # by lane
    rows: list[int]
    found: list[int]  # of each of these rows, which position of the answer


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

    def candidates(self, main: TopK, reasons: Sequence[Reason | None]) -> dict[int, list[tuple[int, float]]]:
        """What `place` needs of the main model's word, by batch row.

        Args:
            main: its most probable tokens at some places, `CANDIDATES` or more.
            reasons: of each of them, why it needs no assistant, or None.
        """
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        return candidates_of(main, rows) if self._team.boundary_rule is not None and rows else {}

    def place(
        self,
        number: int,
        reason: Reason | None = None,
        candidates: Sequence[tuple[int, float]] = (),
        share: float | None = None,
    ) -> Place:
        """Who is to speak of the next token of a text as it stands; nobody is asked yet.

        Args:
            number: of the text.
            reason: why the token needs no assistant, or None.
            candidates: the main model's most probable tokens there, for the boundary rule.
            share: a random number of 0 to below 1 that draws, by the weights, the one member that is to speak
                of those that would; None where all of them are.
        """
        text, weights = self.texts[number], self.weights[number]
        if reason is None and text.unfinished:
            reason = "unfinished character"
        if reason is not None or not self._sessions:
            return Place(number, reason, {}, weights)
        rule = self._team.boundary_rule
        speak = [i for i in range(len(self._sessions)) if text.speaks(i, rule, candidates)]
        if share is not None and speak:
            drawn = _drawn([0, *(i + 1 for i in speak)], weights, share)
            if drawn == 0:
                return Place(number, "main model drawn", {}, weights)
            speak, weights = [drawn - 1], [float(i == drawn) for i in range(len(weights))]
        asked = {i: list(text.ids(i)) for i in speak}
        return Place(number, None if speak else "boundary", asked, weights)

    def session(self, member: int) -> Session:
        """An assistant's session, by its member index."""
        return self._sessions[member - 1]

    def step(self, main: Part, places: Sequence[Place]) -> AssistedStep:
        """Fuse what the assistants say into what the main model says. All are asked, then all are waited for.

        The places of a text are those of one draft, in order. One forward of an assistant gives its word on
        all of them, as long as its ids at one place begin with its ids at the place before. Where a token
        reaches across a place, the assistant is asked for that place by itself.

        Args:
            main: `team.fuser.part(0, ...)` of these places.
            places: of texts that have a lane.

        Raises:
            InputError: a member that gives NaN; a text longer than an assistant's context.
            ModelError: an assistant's forward pass failed.
        """
        members_ms = dict.fromkeys(self._team.names[1:], 0.0)
        fuser = self._team.fuser
        asked = [(i, self._questions(i, places)) for i in range(len(self._sessions))]
        said: dict[int, list[tuple[list[int], Distribution]]] = {}
        for i, own in enumerate(places):
            for assistant, known in own.known.items():
                said.setdefault(assistant, []).append(([i], known))
        while asked := [(i, questions) for i, questions in asked if questions]:
            answers = []
            for i, questions in asked:
                began = perf_counter()
                one = questions.pop(0)
                answer = self._sessions[i].ask(one.targets, fuser.candidates, one.positions)
                answers.append((i, one, answer))
                members_ms[self._team.names[i + 1]] += (perf_counter() - began) * 1e3
            for (i, one, answer), (_, left) in zip(answers, asked, strict=True):
                began = perf_counter()
                given = answer.wait().at(one.found)
                # What a session says may not outlive its next question.
                said.setdefault(i, []).append((one.rows, given.clone() if left else given))
                members_ms[self._team.names[i + 1]] += (perf_counter() - began) * 1e3
        parts = [(i + 1, *_in_order(own)) for i, own in sorted(said.items())]
        weights = [place.weights for place in places]
        fused = fuser.step_parts([main, *fuser.parts(parts)], weights)
        return AssistedStep(fused, members_ms)

    def _questions(self, i: int, places: Sequence[Place]) -> list[_Question]:
        """What assistant i is asked about these places: one question, more where a token reaches across one.

        The last ids of each text come first; what is no beginning of them is left for the next question.
        """
        left: dict[int, list[int]] = {}  # batch rows by text
        for row, place in enumerate(places):
            if i in place.asked and i not in place.known:
                left.setdefault(place.text, []).append(row)
        questions = []
        while left:
            one = _Question({}, {}, [], [])
            rest: dict[int, list[int]] = {}
            start = 0
            for text, rows in left.items():
                ids = places[rows[-1]].asked[i]
                here = [row for row in rows if _begins(ids, places[row].asked[i])]
                if len(here) < len(rows):
                    rest[text] = [row for row in rows if row not in here]
                first = len(places[here[0]].asked[i])
                lane, count = self.lanes[text], len(ids) - first + 1
                one.targets[lane], one.positions[lane] = ids, count
                one.rows.extend(here)
                one.found.extend(start + len(places[row].asked[i]) - first for row in here)
                start += count
            questions.append(one)
            left = rest
        return questions


def _drawn(members: Sequence[int], weights: Sequence[float], share: float) -> int:
    """The member in whose part of the weights this share of their sum lies; the main model if it is 0."""
    ends = list(accumulate(weights[member] for member in members))
    return next((one for one, end in zip(members, ends, strict=True) if share * ends[-1] < end), members[0])


def _begins(ids: Sequence[int], start: Sequence[int]) -> bool:
    return ids[: len(start)] == start


def _in_order(said: Sequence[tuple[list[int], Distribution]]) -> tuple[Distribution, list[int]]:
    """What an assistant said in several pieces, with the batch rows of each: one piece, its rows rising."""
    rows = [row for own, _ in said for row in own]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return joined([one for _, one in said]).at(order), [rows[at] for at in order]
