"""The assistants' side of a batch of texts: what they have read, who takes part in a step, the fusion.

There is no loop here. What the main model says comes from outside, from `cycle.Cycles` or from transformers'
own `generate` (`adapters.DeepenLogitsProcessor`), and so do the tokens that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from deepen_ext.decoding.asker import Asker
from deepen_ext.decoding.assistants_text import AssistantsText
from deepen_ext.decoding.boundary import candidates_of
from deepen_ext.decoding.first_token import put_ends_last
from deepen_ext.decoding.places import Place, Reason
from deepen_ext.decoding.prompt_weights import (
    PromptScore,
    prompt_weights,
    read_prompts,
    tell_of_unequal,
)
from deepen_ext.decoding.questions import in_order
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session, scored_prompts
from deepen_ext.decoding.shares import drawn, handed_over, without
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.errors import MemberLost
from deepen_ext.fusers import FusedStep, Part
from deepen_ext.members.chat import PromptText
from deepen_ext.ops.topk_softmax import TopK


@dataclass
class AssistedStep:
    """What a step gave for its places, and the assistants' share of its time."""

    fused: FusedStep  # its batch rows are the places of the step, in order
    members_ms: dict[str, float]  # forward passes, by assistant


class Assistants:
    """Texts as the assistants of a team have them, by number.

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
        prompts: Sequence[Sequence[PromptText]] = (),
        *,
        shared: SharedForwards | None = None,
    ) -> None:
        """Encode the prompts; `open` comes before the first `step`.

        Args:
            team: whose members 1.. these are.
            prompts: of each text, its beginning as each assistant reads it. These are numbered from 0, and
                each has the lane of its number; `add` brings more.
            shared: forwards to share with other runs.
        """
        self._team = team
        self._members = team.members[1:]
        self._out: set[int] = set()  # assistants that were lost, counted without the main model
        self.texts: dict[int, AssistantsText] = {}
        self.lanes: dict[int, int] = {}
        self.weights: dict[int, Sequence[float]] = {}
        self._last_prompts = [scored_prompts(member, shared) for member in self._members]
        self._shared = shared
        self._sessions: list[WatchedSession] = []
        elsewhere = [i for i, one in enumerate(self._members) if one.backend.capabilities.elsewhere]
        self._asker = Asker(self._sessions, elsewhere, team.fuser.candidates)
        for number, own in enumerate(prompts):
            self.add(number, own)
            self.lanes[number] = number

    def add(self, number: int, prompts: Sequence[PromptText], unfinished: bytes = b"") -> None:
        """One more text.

        Args:
            number: its own.
            prompts: its beginning as each assistant reads it.
            unfinished: what there is of a character after that.
        """
        self.texts[number] = AssistantsText(self._members, prompts, self._out)
        self.texts[number].append(unfinished)
        weights: Sequence[float] = self._team.weights
        for out in self._out:
            weights = without(out + 1, weights)
        self.weights[number] = weights

    def forget(self, number: int) -> None:
        """This text, which has no lane, is asked about no more."""
        del self.texts[number], self.weights[number]

    def open(self, lanes: int | None = None, new_tokens: int = 0) -> None:
        """Make the sessions. On CUDA they take over the buffers of earlier ones.

        Args:
            lanes: how many texts are written at once; None for as many as there are.
            new_tokens: how many tokens a text may grow by, as far as is known.
        """
        lanes = len(self.texts) if lanes is None else lanes
        for i, member in enumerate(self._members):
            longest = max((len(text.ids(i)) for text in self.texts.values()), default=0)
            opened = partial(open_session, member, lanes, longest + new_tokens, self._shared)
            self._sessions.append(WatchedSession(opened))

    @property
    def sessions(self) -> dict[int, WatchedSession]:
        """Of the assistants that are there, by member index."""
        return {i + 1: session for i, session in enumerate(self._sessions) if i not in self._out}

    def read_prompts(self, texts: Sequence[int]) -> dict[int, list[PromptScore]]:
        """How well each assistant reads these texts' prompts, by member index; those that are out do not.

        Their sessions then hold the prompts.
        """
        found = {}
        for i, (session, member) in enumerate(zip(self._sessions, self._members, strict=True)):
            if i not in self._out:
                ids = {self.lanes[text]: self.texts[text].ids(i) for text in texts}
                found[i + 1] = list(read_prompts(session, member, ids, self._last_prompts[i]).values())
        return found

    def weigh(self, texts: Sequence[int], main: Sequence[PromptScore]) -> None:
        """Give these texts the weights of their prompts: see `prompt_weights`.

        Args:
            texts: their numbers. Their weights are those to start from.
            main: of each of them, how well the main model reads its prompt.
        """
        team, scores = self._team, {0: main, **self.read_prompts(texts)}
        for at, text in enumerate(texts):
            given = [self.weights[text][member] for member in scores]
            found = prompt_weights([own[at] for own in scores.values()], given, team.sharpness)
            tell_of_unequal([team.names[member] for member in scores], given, found, team.told)
            by_member = dict(zip(scores, found, strict=True))
            self.weights[text] = [by_member.get(member, 0.0) for member in range(len(team.members))]

    def lost(self) -> dict[int, MemberLost]:
        """The assistants that were lost and are not left out yet: how, by member index."""
        return {
            i + 1: session.error
            for i, session in enumerate(self._sessions)
            if session.error is not None and i not in self._out
        }

    def leave_out(self, member: int) -> None:
        """This assistant, which was lost, has no say any more, in no text.

        Args:
            member: its index.
        """
        self._out.add(member - 1)
        self._sessions[member - 1].close()
        self.weights = {number: without(member, own) for number, own in self.weights.items()}

    def settle(self) -> None:
        """Wait for all that was asked, whatever comes of it: the sessions can then be asked again."""
        self._asker.settle()

    def close(self) -> None:
        """Free all caches."""
        with ExitStack() as closing:  # all of them, whatever one of them raises
            for session in self._sessions:
                closing.callback(session.close)

    def release(self, lane: int) -> None:
        """The lane's text has ended: what it holds is freed."""
        for session in self._sessions:
            session.release(lane)

    def reorder(self, sources: Sequence[int]) -> None:
        """Text b goes on from what text `sources[b]` was (beam search).

        Its lane keeps what the two have in common; the rest is fed again.
        """
        self.texts = {text: self.texts[source].copy() for text, source in enumerate(sources)}

    def restart(self, text: int, prompts: Sequence[PromptText]) -> None:
        """The text is another now; its lane keeps what the two begin with."""
        self.texts[text] = AssistantsText(self._members, prompts, self._out)

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
        there = [i for i in range(len(self._sessions)) if i not in self._out]
        if not there:
            return Place(number, "lost", {}, weights)
        heard = [i for i in there if weights[i + 1]]
        if not heard:
            return Place(number, "no weight", {}, weights)
        shares = {i: text.share(i, rule, candidates, weights) for i in heard}
        speak = [i for i in heard if shares[i]]
        weights = handed_over(weights, {i + 1: share for i, share in shares.items()})
        if share is not None and speak:
            chosen = drawn([0, *(i + 1 for i in speak)], weights, share)
            if chosen == 0:
                return Place(number, "main model drawn", {}, weights)
            speak, weights = [chosen - 1], [float(i == chosen) for i in range(len(weights))]
        asked = {i: list(text.ids(i)) for i in speak}
        return Place(number, None if speak else "boundary", asked, weights)

    def session(self, member: int) -> WatchedSession:
        """An assistant's session, by its member index."""
        return self._sessions[member - 1]

    def ask_ahead(self, places: Sequence[Place], texts: Sequence[int], drafter: int = 0) -> dict[int, float]:
        """Ask members elsewhere that are free, so that they work while the main model does.

        Args:
            places: of the drafts, as far as they are written.
            texts: of which the next place is asked about too, before the main model has said anything of it.
            drafter: a member that is not asked here, by its index.

        Returns:
            by member index, the milliseconds it took.

        Raises:
            ModelError: a forward pass failed, of this question or of the one before.
        """
        there = [i for i in self._asker.elsewhere if i not in self._out]
        if not there:
            return {}
        coming = []
        for number in texts:
            text, weights = self.texts[number], self.weights[number]
            if not text.unfinished:
                asked = {i: list(text.ids(i)) for i in there if weights[i + 1]}
                coming.append(Place(number, None, asked, weights))
        spent = self._asker.ask_ahead([*places, *coming], self.lanes, drafter - 1)
        return {i + 1: ms for i, ms in spent.items()}

    def step(self, main: Part, places: Sequence[Place], firsts: Sequence[int] = ()) -> AssistedStep:
        """Fuse what the assistants say into what the main model says. All are asked, then all are waited for.

        The places of a text are those of one draft, in order. One forward of an assistant gives its word on
        all of them, as long as its ids at one place begin with its ids at the place before. Where a token
        reaches across a place, the assistant is asked for that place by itself.

        Args:
            main: `team.fuser.part(0, ...)` of these places.
            places: of texts that have a lane.
            firsts: which of them are first tokens of texts that end where the main model's own EOS ids say.

        Raises:
            InputError: a member that gives NaN; a text longer than an assistant's context.
            ModelError: an assistant's forward pass failed; nothing is under way then.
        """
        try:
            said, spent = self._asker.ask(places, self.lanes)
        except Exception:
            self.settle()
            raise
        parts = [(i + 1, *in_order(own)) for i, own in sorted(said.items())]
        weights = [place.weights for place in places]
        fused = self._team.fuser.step_parts([main, *self._team.fuser.parts(parts)], weights)
        if self._team.fuser.first_end_needs_all:
            fused = put_ends_last(fused, firsts, self._team.members)
        return AssistedStep(fused, {self._team.names[i + 1]: ms for i, ms in spent.items()})
