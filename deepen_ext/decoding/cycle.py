"""One cycle of the loop: the main model writes ahead, the assistants verify, what stands becomes text.

        drafts    = main model (or another drafter) writes some tokens of each text   drafts/ahead.py
        said      = every assistant, of all places of the drafts, in one forward      assistants.py
        logits    = fuser(main model's word, said), all places in one call            fusers/
        for each text, place by place:
            token = sampler(logits[place])
            write it; where it is not the draft's, drop what follows

A draft of one place is a step without a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.accept import Accepted, Acceptor
from deepen_ext.decoding.assistants import Assistants, AssistedStep
from deepen_ext.decoding.drafts.ahead import Writer
from deepen_ext.decoding.drafts.draft_settings import MAIN, DraftSettings
from deepen_ext.decoding.drafts.pace import Pace
from deepen_ext.decoding.generation import Generation, Timings
from deepen_ext.decoding.limits import check_choice, check_lengths, check_main_model
from deepen_ext.decoding.lost import Losses
from deepen_ext.decoding.places import Ahead
from deepen_ext.decoding.prompt_weights import read_prompts
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.schedule import Schedule
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session, scored_prompts
from deepen_ext.decoding.skips import Skips
from deepen_ext.decoding.spans.span_writer import SpanWriter
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress, Written
from deepen_ext.decoding.trace import Observer
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.errors import MemberLost
from deepen_ext.fusers import SpansFuser
from deepen_ext.members.distribution import gathered
from deepen_ext.ops.transfer import to_device


class Cycles:
    """The texts of a team that are written together, a cycle at a time."""

    def __init__(
        self,
        team: Team,
        settings: Settings,
        prompts: Sequence[Prompt],
        lanes: int,
        *,
        capacity: int = 0,
        drafts: DraftSettings | None = None,
        shared: SharedForwards | None = None,
        observer: Callable[[], Observer] | None = None,
        skipping: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that everything fits, before anything is computed; prepare the texts; open the sessions.

        Args:
            team: who writes.
            settings: of the texts; of those that come later, what they have in common.
            prompts: one for each text.
            lanes: how many texts are written at once.
            capacity: without prompts, how many tokens a text may have, as far as is known.
            drafts: how far to write ahead, and who does; None for no drafts.
            shared: forwards to share with other runs over the same prompts.
            observer: makes what is told every token; None for nothing.
            skipping: keywords of `Skips`.

        Raises:
            InputError: see `Run`.
        """
        check_main_model(team, settings)
        check_choice(team, settings)
        self._team = team
        self._chooser = Chooser(settings, [prompt.main_ids for prompt in prompts], team.device)
        self._stopping = Stopping()
        self._schedule = Schedule(lanes)
        self._assistants = Assistants(team, shared=shared)
        self._texts: dict[int, TextInProgress] = {}
        for number, prompt in enumerate(prompts):
            self._take(number, prompt, settings)
        skips = Skips(team, settings, self._chooser, **(skipping or {}))
        lengths = {number: self._assistants.texts[number].tokens() for number in self._texts}
        check_lengths(team, self._texts, lengths, lanes, None if shared is None else shared.bytes_held)
        self._backends = team.backends  # a member that is lost may not say it any more
        self._observer = None if observer is None else observer()
        new_tokens = max((text.new_tokens for text in self._texts.values()), default=capacity)
        most = max((one.prompt_length + one.new_tokens for one in self._texts.values()), default=capacity)
        with ExitStack() as opened:  # what is open is closed should the next not open
            if self._observer is not None:
                opened.callback(self._observer.close)
            opened.callback(self._assistants.close)
            self._assistants.open(lanes, new_tokens)
            self._main = WatchedSession(partial(open_session, team.main, lanes, most, shared))
            opened.pop_all()
        named = team.main.special_in(settings.every_stop_string)  # they end the text: they can be written
        unwritable = team.main.unwritable([*settings.eos_ids, *named])
        self._acceptor = Acceptor(team, self._texts, self._assistants, self._chooser, self._stopping)
        writes = team.main.backend.capabilities.writes and bool(prompts) and shared is None
        writes = writes and self._chooser.guesses_by_scores
        drafts = drafts or DraftSettings(0, (MAIN,))
        self._pace = Pace(team, drafts, sampled=settings.do_sample, at_once=writes)
        written = team, self._main, self._assistants, self._texts, self._chooser, skips
        self._writer: Writer | SpanWriter
        if isinstance(team.fuser, SpansFuser):
            self._writer = SpanWriter(
                *written, team.fuser.margin, unwritable=unwritable, eos_ids=settings.eos_ids
            )
        else:
            self._writer = Writer(
                *written,
                self._stopping,
                self._pace,
                unwritable=unwritable,
                in_place=shared is None,  # what a session of its own gives nobody else reads
                at_once=writes,
            )
        self._losses = Losses(team, self._texts, self._main, self._assistants, self._pace, self.results)
        self._unweighed: list[int] = []  # texts that began, and wait for the weights of their prompts
        self._last_prompts = scored_prompts(team.main, shared)
        self._timings = Timings(members_ms=dict.fromkeys(team.names, 0.0), rows=lanes)

    def _take(self, number: int, prompt: Prompt, settings: Settings) -> None:
        """One more text; the chooser has it already."""
        length = len(prompt.main_ids)
        self._texts[number] = TextInProgress(list(prompt.main_ids), length, settings.new_tokens(length))
        self._assistants.add(number, prompt.texts, prompt.unfinished)
        self._stopping.add(number, settings)
        self._schedule.add(number)

    def results(self) -> list[Generation]:
        """What was written, text by text."""
        return [text.result(self._timings, self._backends) for text in self._texts.values()]

    @property
    def timings(self) -> Timings:
        """Of all texts together."""
        return self._timings

    def _cycle(self) -> list[Written]:
        """One token or more for every text that is not finished."""
        begun = self._begun()
        self._unweighed = begun if self._team.weighs_prompts else []
        while True:
            began = perf_counter()
            before = {number: self._assistants.texts[number] for number in self._schedule.active}
            try:
                ahead, read, step = self._verified(alone=bool(begun))
                break
            except MemberLost as error:
                self._losses.handle(error)
                for number, text in before.items():
                    self._assistants.texts[number] = text
            except Exception:
                self._assistants.settle()  # an assistant may have been asked ahead
                raise
        fused = perf_counter()
        accepted = self._accepted(ahead, step)
        ended = perf_counter()
        if not begun and not ahead.decided:  # a step that begins a text reads a prompt
            times = {"verified_ms": (ended - read) * 1e3, "cycle_ms": (ended - began) * 1e3}
            self._pace.learn(ahead, step, accepted, **times)
        members_ms = {name: step.members_ms.get(name, 0.0) for name in self._team.names}
        for member, spent in ahead.members_ms.items():
            members_ms[self._team.names[member]] += spent
        stages = {
            "fusion": (fused - began) * 1e3 - sum(members_ms.values()) - ahead.handoff_ms,
            "sampling": self._acceptor.sampling_ms,
            "handoff": (ended - fused) * 1e3 - self._acceptor.sampling_ms + ahead.handoff_ms,
        }
        if self._observer is not None:
            times_ms = {"members": members_ms, **stages}
            self._observer.step(self._team, step.fused, accepted, times_ms, self._losses.names)
        for number in ahead.drafts:
            if self._texts[number].finish_reason is not None:
                self._release(number)
        self._timings.add_step(
            members_ms,
            stages,
            [one.proposal.place.reason for one in accepted],
            texts=len(ahead.drafts),
            drafted=ahead.drafted,
            stood=sum(one.stood for one in accepted),
        )
        return [one.written for one in accepted]

    def _begun(self) -> list[int]:
        """The texts that get their first token in this cycle, with those that wait in the free lanes."""
        begun = self._schedule.begin()
        self._assistants.lanes = self._schedule.lanes
        self._schedule.start(begun)
        return begun

    def _accepted(self, ahead: Ahead, step: AssistedStep) -> list[Accepted]:
        return self._acceptor.accept(ahead.drafts, step.fused)

    def _verified(self, *, alone: bool) -> tuple[Ahead, float, AssistedStep]:
        """Drafts of all texts (see `Writer.write`), when they were there, and what the members say of it."""
        if self._unweighed:
            ids = {self._assistants.lanes[number]: self._texts[number].ids for number in self._unweighed}
            main_scores = read_prompts(self._main, self._team.main, ids, self._last_prompts).values()
            self._assistants.weigh(self._unweighed, list(main_scores))
            self._unweighed = []
        ahead = self._writer.write(self._schedule.active, alone=alone)
        read = perf_counter()
        proposals = [one for draft in ahead.drafts.values() for one in draft]
        main = self._team.fuser.part(0, gathered([(one.main, one.row) for one in proposals]))
        starts = zip(ahead.drafts, accumulate(map(len, ahead.drafts.values()), initial=0), strict=False)
        firsts = [row for number, row in starts if self._begins(number)]
        step = self._assistants.step(main, [one.place for one in proposals], firsts)
        if ahead.decided:
            tokens = to_device([one.token for one in proposals], self._team.device, torch.int32)
            step.fused = replace(step.fused, chosen=tokens)
        return ahead, read, step

    def _begins(self, number: int) -> bool:
        """Whether the next token is the text's first, and its EOS ids are the main model's own."""
        own_ends = self._stopping.ends(number) == frozenset(self._team.main.eos_ids)
        return own_ends and not self._texts[number].written

    def _end_full(self) -> bool:
        """End the texts that some member cannot read any more; whether any text is left, or waits."""
        for number in list(self._schedule.active):
            text = self._texts[number]
            if not self._team.main.fits(len(text.ids)) or not self._assistants.texts[number].fits():
                text.finish_reason = "context"
                self._release(number)
        return bool(self._schedule.active) or self._schedule.waits

    def _release(self, number: int) -> None:
        """The text has ended: its lane is free, for the next one or for good; its drafts are forgotten."""
        self._schedule.end(number)
        self._writer.forget(number)
        self._pace.forget(number)
        for lane in self._schedule.spare():
            self._main.release(lane)
            self._assistants.release(lane)

    def _end_of_text(self, number: int) -> Written:
        rest = self._assistants.texts[number].finish()
        if rest:
            self._texts[number].pieces.append(rest)
        return Written(number, self._texts[number].ids[-1], rest)

    def _free(self) -> None:
        with ExitStack() as freed:  # all of it, whatever one of them raises; the last one first
            freed.callback(self._team.save_rows)
            if self._observer is not None:
                freed.callback(self._observer.close)
            freed.callback(self._assistants.close)
            freed.callback(self._main.close)
