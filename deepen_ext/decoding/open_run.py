"""A run that texts join and leave between its cycles, each with settings of its own.

A text that joins has its prompt read in pieces, one piece in a cycle, so that the texts beside it go on
(chunked prefill; Agrawal et al., arXiv 2308.16369). The last piece is read in the cycle of its first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from deepen_ext.decoding.accept import Accepted
from deepen_ext.decoding.assistants import AssistedStep
from deepen_ext.decoding.choice_error import ChoiceError
from deepen_ext.decoding.cycle import Cycles
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.generation import FinishReason, Generation, Timings
from deepen_ext.decoding.kept_lanes import KeptLanes
from deepen_ext.decoding.limits import check_lengths
from deepen_ext.decoding.places import Ahead
from deepen_ext.decoding.prompt_weights import PROMPT_TOKENS
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress, Written
from deepen_ext.decoding.trace import Observer
from deepen_ext.errors import MemberLost
from deepen_ext.members.member import Member

_CAPACITY = 256  # tokens of a text that there is room for at first
_ALONE = 512  # most tokens of prompts that each member reads in a step where nobody waits for tokens


@dataclass
class _Prompt:
    """A prompt that is being read: of each member, how many tokens are read, and how many are to be."""

    goals: list[int]
    read: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return sum(goal - read for goal, read in zip(self.goals, self.read, strict=True))


class OpenRun(Cycles):
    """Texts of one team, as many at once as there are lanes. One thread uses it.

        number = run.add(prompt, settings)
        while run.busy:
            for written in run.step(): ...
            run.ended()                         texts that are done, by number

    What all its texts have in common: the team, how drafts are made, the tokens that cannot be written.
    """

    def __init__(
        self,
        team: Team,
        settings: Settings,
        lanes: int,
        *,
        chunk: int,
        drafts: DraftSettings | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Open the sessions; no text is there yet.

        Args:
            team: who writes.
            settings: for what all texts have in common (see `joins`).
            lanes: most texts at once.
            chunk: most tokens of prompts that each member reads beside texts that are being written.
            drafts: see `Run`.
            observer: is told every token.

        Raises:
            InputError: see `Run`.
        """
        super().__init__(
            team,
            settings,
            (),
            lanes,
            capacity=_CAPACITY,
            drafts=drafts,
            observer=None if observer is None else lambda: observer,
        )
        self._lane_count = lanes
        self._chunk = self._piece = chunk
        self._numbers = count()
        self._prompts: dict[int, _Prompt] = {}
        self._lengths: dict[int, list[int]] = {}  # of each text's prompt, its tokens for each assistant
        self._kept = KeptLanes()
        self._ended: list[int] = []
        self.failures: dict[int, ChoiceError] = {}
        for lane in range(lanes):
            self._set_aside(lane, forget=True)

    @property
    def busy(self) -> bool:
        """Whether a text is there."""
        return bool(self._texts)

    @property
    def free(self) -> int:
        """How many more texts there are lanes for."""
        return self._lane_count - len(self._texts)

    @property
    def reading(self) -> int:
        """How many prompts are being read."""
        return len(self._prompts)

    @property
    def bytes_held(self) -> dict[torch.device, int]:
        """Bytes of all members' caches, by device."""
        held: dict[torch.device, int] = {}
        for session in (self._main, *self._assistants.sessions.values()):
            for device, size in session.bytes_held.items():
                held[device] = held.get(device, 0) + size
        return held

    @property
    def lost(self) -> Sequence[str]:
        """The assistants that are out (`on_failure="continue"`), also for texts to come."""
        return self._losses.names

    def add(self, prompt: Prompt, settings: Settings) -> int:
        """One more text; there is a lane for it. Returns its number.

        Args:
            prompt: its beginning.
            settings: its own, with one seed.

        Raises:
            NoRoom: the memory that is left does not hold it.
            InputError: it exceeds a context.
        """
        number = next(self._numbers)
        self._chooser.add(number, settings, prompt.main_ids)
        self._take(number, prompt, settings)
        self._texts[number].lost |= dict.fromkeys(self.lost, 0)
        self._lengths[number] = self._assistants.texts[number].tokens()
        try:
            check_lengths(
                self._team,
                self._texts,
                self._lengths,
                self._lane_count,
                self._bytes_of,
                self._most_used(),
                self._kept.lengths,
            )
        except BaseException:
            self._schedule.withdraw(number)
            self._forget(number)
            raise
        self._prompts[number] = self._prompt(number)  # what its lane holds counts too, so before it has one
        self._schedule.begin(lambda text, free: self._kept.best(self._texts[text].ids, free))
        self._assistants.lanes = self._schedule.lanes
        return number

    def result(self, number: int) -> Generation:
        """What was written of a text so far."""
        return self._texts[number].result(self._timings, self._backends)

    def cancel(self, number: int) -> None:
        """The text ends here."""
        self._end(number, "cancelled")

    def step(self, *, beside: bool = False) -> list[Written]:
        """Read some of the prompts, and write a token or more of every text that is being written.

        Args:
            beside: texts of other runs wait for this step, as those of this run do.

        Raises:
            DeepenError: see `Run`. The run can only be closed then. What is wrong with one text alone ends
                that text: see `failures`.
        """
        self._timings = Timings(members_ms=dict.fromkeys(self._team.names, 0.0))
        self._piece = self._chunk if beside or self._schedule.active else _ALONE
        try:
            self._read_prompts()
        except MemberLost as error:
            self._losses.handle(error)
        self._end_full()
        ready = any(prompt.left == 0 for prompt in self._prompts.values())
        written = self._cycle() if self._schedule.active or ready else []
        if (failure := self._acceptor.take_failure()) is not None:
            self._fail(failure)
        return written

    def ended(self) -> dict[int, TextInProgress]:
        """The texts that have ended since the last call. They are forgotten."""
        ended = {number: self._texts[number] for number in self._ended}
        self._ended = []
        for number, text in ended.items():
            text.rest = self._assistants.texts[number].finish()
            self._forget(number)
        return ended

    def close(self) -> None:
        """Free all caches, and keep the relative rows that were computed."""
        self._free()

    def _read_prompts(self) -> None:
        """A piece of the prompts, for each member: of those with least left first, and of the oldest."""
        if not self._prompts:
            return
        budget = [self._piece] * len(self._team.members)
        oldest = next(iter(self._prompts))
        order = sorted(self._prompts, key=lambda number: self._prompts[number].left)
        for number in dict.fromkeys([oldest, *order]):
            share = 2 if number == oldest and len(order) > 1 else 1
            self._read_piece(number, budget, share)

    def _read_piece(self, number: int, budget: list[int], share: int) -> None:
        """A piece of one prompt. All members are asked, then all are waited for.

        Raises:
            DeepenError: see `step`; nothing is under way then.
        """
        prompt, lane = self._prompts[number], self._schedule.lanes[number]
        answers = []
        try:
            for member, ids in enumerate(self._ids(number)):
                session = self._assistants.sessions.get(member) if member else self._main
                goal, read = prompt.goals[member], prompt.read[member]
                piece = min(goal - read, budget[member] // share)
                if session is None:
                    prompt.read[member] = goal
                elif piece > 0:
                    answers.append(session.ask({lane: ids[: read + piece]}, 1))
                    prompt.read[member] += piece
                    budget[member] -= piece
            for answer in answers:
                answer.wait()
        except Exception:
            self._main.settle()
            self._assistants.settle()
            raise

    def _prompt(self, number: int) -> _Prompt:
        """What is to be read ahead: all but what the cycle of the first token reads.

        What another lane holds already counts as read: the session takes it over with the next piece.
        """
        last = PROMPT_TOKENS + 1 if self._team.weighs_prompts else self._chunk
        ids = self._ids(number)
        goals = [max(len(own) - last, 0) for own in ids]
        shared = self._shared(number, ids)
        return _Prompt(goals, [min(goal, own) for goal, own in zip(goals, shared, strict=True)])

    def _shared(self, number: int, ids: Sequence[list[int]]) -> list[int]:
        """Of each member, how many of these ids some lane holds already."""
        others = [self._ids(other) for other in self._schedule.active if other != number]
        return self._kept.shared(ids, others)

    def _begun(self) -> list[int]:
        """The texts whose prompts are read but for the last piece, until these are too many tokens."""
        begun: list[int] = []
        room = self._piece
        for number, prompt in list(self._prompts.items()):
            if prompt.left == 0 and room > 0:
                begun.append(number)
                room -= len(self._texts[number].ids) - prompt.read[0]
                del self._prompts[number]
        self._schedule.start(begun)
        return begun

    def _accepted(self, ahead: Ahead, step: AssistedStep) -> list[Accepted]:
        try:
            return super()._accepted(ahead, step)
        except ChoiceError as error:  # the cycle lets go of texts that have a finish reason
            self.failures[error.text] = error
            self._texts[error.text].finish_reason = "cancelled"
            return []

    def _fail(self, error: Exception) -> None:
        """A text that cannot go on ends, and the others do."""
        if not isinstance(error, ChoiceError):
            raise error
        self.failures[error.text] = error
        self._end(error.text, "cancelled")

    def _end(self, number: int, reason: FinishReason) -> None:
        if self._texts[number].finish_reason is None:
            self._texts[number].finish_reason = reason
            self._release(number)

    def _release(self, number: int) -> None:
        """Keep the newest lanes' states for texts that begin alike; the others are emptied."""
        unread = self._prompts.pop(number, None)
        ids = self._ids(number)
        if unread is not None:
            ids = [own[:read] for own, read in zip(ids, unread.read, strict=True)]
        lane = self._schedule.end(number)
        self._ended.append(number)
        self._set_aside(lane)
        oldest = self._kept.keep(lane, [own[:-1] for own in ids])  # the last token was not read
        if oldest is not None:
            self._set_aside(oldest, forget=True)

    def _most_used(self) -> int:
        """How many lanes there are up to the last one that holds states, with one more text."""
        held: set[int] = {*self._schedule.lanes.values(), *self._kept}
        another = next((lane for lane in range(self._lane_count) if lane not in held), 0)
        return 1 + max(another, *held, 0)

    def _set_aside(self, lane: int, *, forget: bool = False) -> None:
        for session in (self._main, *self._assistants.sessions.values()):
            session.set_aside(lane, forget=forget)

    def _bytes_of(self, member: Member, lanes: int) -> Mapping[torch.device, int]:
        """What the member's session holds."""
        i = next(i for i, own in enumerate(self._team.members) if own is member)
        session = self._assistants.sessions.get(i) if i else self._main
        return {} if session is None else session.bytes_held

    def _ids(self, number: int) -> list[list[int]]:
        """The text's ids, member after member; what an assistant that was lost has is no matter."""
        own = self._assistants.texts[number]
        return [self._texts[number].ids, *(own.ids(i) for i in range(len(self._team.members) - 1))]

    def _forget(self, number: int) -> None:
        del self._texts[number], self._lengths[number]
        self._assistants.forget(number)
        self._chooser.forget(number)
        self._stopping.forget(number)
        self._pace.forget(number)
        self._writer.forget(number)
