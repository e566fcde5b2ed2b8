"""The loop: the main model writes ahead, the assistants verify, the tokens that stand become text.

    while texts are open:
        drafts    = main model (or another drafter) writes some tokens of each text   drafts/ahead.py
        said      = every assistant, of all places of the drafts, in one forward      assistants.py
        logits    = fuser(main model's word, said), all places in one call            fusers/
        for each text, place by place:
            token = sampler(logits[place])
            write it; where it is not the draft's, drop what follows

A draft of one place is a step without a draft.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.accept import Acceptor
from deepen_ext.decoding.assistants import Assistants, AssistedStep
from deepen_ext.decoding.drafts.ahead import Writer
from deepen_ext.decoding.drafts.draft_settings import MAIN, DraftSettings
from deepen_ext.decoding.drafts.pace import Pace
from deepen_ext.decoding.generation import Generation, Timings
from deepen_ext.decoding.limits import check_choice, check_lengths, check_main_model
from deepen_ext.decoding.lost import Losses
from deepen_ext.decoding.one_reader import OneReader
from deepen_ext.decoding.places import Ahead
from deepen_ext.decoding.prompt_weights import read_prompts
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.schedule import Schedule
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session
from deepen_ext.decoding.skips import Skips
from deepen_ext.decoding.spans.span_writer import SpanWriter
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress, Written
from deepen_ext.decoding.trace import Trace
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.errors import InputError, MemberLost
from deepen_ext.fusers import SpansFuser
from deepen_ext.ground.numbers import whole_number
from deepen_ext.members.distribution import gathered
from deepen_ext.ops.transfer import to_device


class Run:
    """One generation for B prompts: iterate it, a cycle at a time; `close` frees the caches.

    Closing early is no error: `results` then gives what was written.
    """

    def __init__(
        self,
        team: Team,
        prompts: Sequence[Prompt],
        settings: Settings,
        *,
        certified_skip: bool = False,
        confidence_gate: float | None = None,
        drafts: DraftSettings | None = None,
        trace: str | Path | Callable[[dict[str, Any]], object] | None = None,
        streamer: Any = None,
        shared: SharedForwards | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Check that everything fits, before anything is computed.

        Args:
            team: who writes.
            prompts: one for each text.
            settings: of the decoding.
            certified_skip: see `Skips`, as `confidence_gate`.
            confidence_gate: see there.
            drafts: how far to write ahead, and who does; None for no drafts.
            trace: a file or a function that is told every token (see `Trace`).
            streamer: one of transformers', for a single text.
            shared: forwards to share with other runs over the same prompts.
            batch_size: how many texts are written at once; None for all (see `Schedule`).

        Raises:
            InputError: no prompts, a setting that does not fit, a prompt that with its new tokens exceeds
                some member's context, or a batch that exceeds the memory.
        """
        if not prompts:
            raise InputError("there are no prompts; give one or more")
        if streamer is not None and len(prompts) > 1:
            raise InputError("a streamer takes one prompt; leave it out, or give the prompts one at a time")
        if batch_size is not None:
            batch_size = whole_number("the batch size", batch_size, 1)
        check_main_model(team, settings)
        check_choice(team, settings)
        self._team = team
        chooser = Chooser(settings, [prompt.main_ids for prompt in prompts], team.device)
        skips = Skips(team, chooser, certified_skip=certified_skip, confidence_gate=confidence_gate)
        self._texts = [
            TextInProgress(list(one.main_ids), len(one.main_ids), settings.new_tokens(len(one.main_ids)))
            for one in prompts
        ]
        at_once = min(batch_size or len(prompts), len(prompts))
        self._schedule = Schedule(len(prompts), at_once)
        self._assistants = Assistants(
            team,
            [prompt.texts for prompt in prompts],
            lanes=at_once,
            new_tokens=max(text.new_tokens for text in self._texts),
            shared=shared,
        )
        for text, prompt in zip(self._assistants.texts, prompts, strict=True):
            text.append(prompt.unfinished)
        tokens = [text.tokens() for text in self._assistants.texts]
        check_lengths(team, self._texts, tokens, at_once, shared)
        self._backends = team.backends  # a member that is lost may not say it any more
        self._trace = None if trace is None else Trace(trace)
        capacity = max(text.prompt_length + text.new_tokens for text in self._texts)
        with ExitStack() as opened:  # what is open is closed should the next not open
            if self._trace is not None:
                opened.callback(self._trace.close)
            opened.callback(self._assistants.close)
            self._assistants.open()
            self._main = WatchedSession(partial(open_session, team.main, at_once, capacity, shared))
            opened.pop_all()
        named = team.main.special_in(settings.every_stop_string)  # they end the text: they can be written
        stopping = Stopping(settings, len(prompts))
        self._acceptor = Acceptor(team, self._texts, self._assistants, chooser, stopping)
        writes = team.main.backend.capabilities.writes and shared is None and chooser.guesses_by_scores
        drafts = drafts or DraftSettings(0, (MAIN,))
        self._pace = Pace(team, drafts, sampled=settings.do_sample, at_once=writes)
        written = team, self._main, self._assistants, self._texts, chooser, skips
        unwritable = team.main.unwritable([*settings.eos_ids, *named])
        self._writer: Writer | SpanWriter
        if isinstance(team.fuser, SpansFuser):
            self._writer = SpanWriter(*written, team.fuser.margin, unwritable=unwritable)
        else:
            self._writer = Writer(
                *written,
                stopping,
                self._pace,
                unwritable=unwritable,
                in_place=shared is None,  # what a session of its own gives nobody else reads
                at_once=writes,
            )
        self._losses = Losses(team, self._texts, self._main, self._assistants, self._pace, self.results)
        self._unweighed: list[int] = []  # texts that began, and wait for the weights of their prompts
        self._cancelled = False
        self._streamer = streamer
        self._timings = Timings(members_ms=dict.fromkeys(team.names, 0.0), rows=at_once)
        self._steps = OneReader(self._write())

    def __iter__(self) -> Iterator[list[Written]]:
        return self._steps

    def close(self) -> None:
        """Stop, free all caches, and keep the relative rows that were computed."""
        self._cancelled = True
        if self._steps.close():
            self._free()
        # Else another thread is in a step: the loop ends after it, and frees.

    def results(self) -> list[Generation]:
        """What was written, text by text."""
        return [text.result(self._timings, self._backends) for text in self._texts]

    @property
    def timings(self) -> Timings:
        """Of the whole batch."""
        return self._timings

    def _write(self) -> Generator[list[Written], None, None]:
        began = perf_counter()
        try:
            if self._streamer is not None:
                self._streamer.put(torch.tensor([self._texts[0].ids]))
            while not self._cancelled and self._end_full():
                written = self._cycle()
                spent = (perf_counter() - began) * 1e3
                self._timings.step_ms.append(spent)
                self._timings.total_ms += spent  # the time between the steps is the reader's
                if self._timings.steps == 1:
                    self._timings.end_of_prompt()
                yield written
                if self._acceptor.failure is not None:
                    raise self._acceptor.failure
                began = perf_counter()
            rest = [self._end_of_text(number) for number in range(len(self._texts))]
            if any(one.text for one in rest):
                yield [one for one in rest if one.text]
        finally:
            self._free()  # also after an interrupt: what was computed is not lost

    def _cycle(self) -> list[Written]:
        """One token or more for every text that is not finished."""
        begun = self._schedule.begun()
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
        fused = perf_counter()
        accepted = self._acceptor.accept(ahead.drafts, step.fused)
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
        if self._trace is not None:
            times_ms = {"members": members_ms, **stages}
            self._trace.step(self._team, step.fused, accepted, times_ms, self._losses.names)
        if self._streamer is not None:
            for one in accepted:
                self._streamer.put(torch.tensor([one.token]))
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

    def _verified(self, *, alone: bool) -> tuple[Ahead, float, AssistedStep]:
        """Drafts of all texts (see `Writer.write`), when they were there, and what the members say of it."""
        if self._unweighed:
            ids = {self._assistants.lanes[number]: self._texts[number].ids for number in self._unweighed}
            main_scores = read_prompts(self._main, self._team.main, ids).values()
            self._assistants.weigh(self._unweighed, list(main_scores))
            self._unweighed = []
        ahead = self._writer.write(self._schedule.active, alone=alone)
        read = perf_counter()
        proposals = [one for draft in ahead.drafts.values() for one in draft]
        main = self._team.fuser.part(0, gathered([(one.main, one.row) for one in proposals]))
        step = self._assistants.step(main, [one.place for one in proposals])
        if ahead.decided:
            tokens = to_device([one.token for one in proposals], self._team.device, torch.int32)
            step.fused = replace(step.fused, chosen=tokens)
        return ahead, read, step

    def _end_full(self) -> bool:
        """End the texts that some member cannot read any more; whether any text is left."""
        for number in list(self._schedule.active):
            text = self._texts[number]
            if not self._team.main.fits(len(text.ids)) or not self._assistants.texts[number].fits():
                text.finish_reason = "context"
                self._release(number)
        return bool(self._schedule.active)

    def _release(self, number: int) -> None:
        following = self._schedule.end(number)
        if following is None:
            self._main.release(self._assistants.lanes[number])
        self._assistants.release(number, following)

    def _end_of_text(self, number: int) -> Written:
        rest = self._assistants.texts[number].finish()
        if rest:
            self._texts[number].pieces.append(rest)
        return Written(number, self._texts[number].ids[-1], rest)

    def _free(self) -> None:
        with ExitStack() as freed:  # all of it, whatever one of them raises; the last one first
            freed.callback(self._team.save_rows)
            if self._trace is not None:
                freed.callback(self._trace.close)
            if self._streamer is not None:
                freed.callback(self._streamer.end)  # whoever reads from it must not wait for ever
                self._streamer = None
            freed.callback(self._assistants.close)
            freed.callback(self._main.close)
