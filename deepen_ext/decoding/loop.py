"""The loop: for every text of a batch what the main model says, the assistants' word, a token, its text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.assistants import Assistants, AssistedStep
from deepen_ext.decoding.generation import Generation, Timings
from deepen_ext.decoding.limits import check_lengths, check_main_model
from deepen_ext.decoding.one_reader import OneReader
from deepen_ext.decoding.prompt_weights import prompt_weights, read_prompts
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.schedule import Schedule
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session
from deepen_ext.decoding.skips import Skips
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress, Written
from deepen_ext.decoding.trace import Trace
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number


class Run:
    """One generation for B prompts: iterate it, a step at a time; `close` frees the caches.

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
        self._team = team
        self._chooser = Chooser(settings, [prompt.main_ids for prompt in prompts], team.device)
        self._skips = Skips(
            team, self._chooser, certified_skip=certified_skip, confidence_gate=confidence_gate
        )
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
        self._assistants.open()
        self._trace = None if trace is None else Trace(trace)
        capacity = max(text.prompt_length + text.new_tokens for text in self._texts)
        self._main = open_session(team.main, at_once, capacity, shared)
        named = team.main.special_in(settings.every_stop_string)  # they end the text: they can be written
        self._unwritable = team.main.unwritable([*settings.eos_ids, *named])
        self._shared = shared is not None
        self._stopping = Stopping(settings, len(prompts))
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
        return [text.result(self._timings, self._team.backends) for text in self._texts]

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
                written = self._step()
                spent = (perf_counter() - began) * 1e3
                self._timings.step_ms.append(spent)
                self._timings.total_ms += spent  # the time between the steps is the reader's
                if self._timings.steps == 1:
                    self._timings.end_of_prompt()
                yield written
                began = perf_counter()
            rest = [self._end_of_text(number) for number in range(len(self._texts))]
            if any(one.text for one in rest):
                yield [one for one in rest if one.text]
        finally:
            self._free()  # also after an interrupt: what was computed is not lost

    def _step(self) -> list[Written]:
        """One token for every text that is not finished."""
        began = perf_counter()
        if (begun := self._schedule.begun()) and self._team.weighs_prompts:
            self._weigh_prompts(begun)
        active = list(self._schedule.active)
        ids = [self._texts[number].ids for number in active]
        targets = {self._assistants.lanes[number]: own for number, own in zip(active, ids, strict=True)}
        said = self._main.ask(targets, self._team.fuser.candidates).wait()
        # What a session of its own gives nobody else reads.
        said = said.without(self._unwritable, in_place=not self._shared)
        read = perf_counter()
        main = self._team.fuser.part(0, said)
        unneeded = self._skips.reasons(main, active, ids)
        step = self._assistants.step(main, active, unneeded=unneeded)
        fused = perf_counter()
        chosen = self._chooser.choose(step.fused.logits, active, ids, step.fused.chosen)
        tokens, main_choices = step.fused.read(chosen)
        sampled = perf_counter()
        members_ms = {self._team.names[0]: (read - began) * 1e3, **step.members_ms}
        stages = {
            "fusion": (fused - read) * 1e3 - sum(step.members_ms.values()) - step.handoff_ms,
            "handoff": step.handoff_ms,
            "sampling": (sampled - fused) * 1e3,
        }
        if self._trace is not None:
            positions = [self._texts[number].written for number in active]
            self._trace.step(self._team, step, active, positions, tokens, {"members": members_ms, **stages})
        explained = perf_counter()  # writing the trace is no stage
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens))
        written = []
        for number, token, main_choice in zip(active, tokens, main_choices, strict=True):
            self._texts[number].ids.append(token)
            self._texts[number].changed += token != main_choice
            written.append(self._hand_over(number, token))
        self._end_finished(active, step)
        stages["handoff"] += (perf_counter() - explained) * 1e3
        self._timings.add_step(members_ms, stages, step.reasons)
        return written

    def _weigh_prompts(self, texts: list[int]) -> None:
        """Each text's weights from how well the members read its prompt."""
        team = self._team
        ids = {self._assistants.lanes[number]: self._texts[number].ids for number in texts}
        main = read_prompts(self._main, team.main, ids).values()
        for number, *scores in zip(texts, main, *self._assistants.read_prompts(texts), strict=True):
            self._assistants.weights[number] = prompt_weights(scores, team.weights)

    def _hand_over(self, number: int, token: int) -> Written:
        """Give the token's text to the assistants; a special token has none, and they read its name."""
        if self._stopping.ends_text(token):
            return Written(number, token, "")
        main, text = self._team.main, self._texts[number]
        data = main.vocabulary.bytes_of(token)
        name = "" if data else main.name_of(token)
        read = self._assistants.texts[number].append(data or name.encode())
        self._stopping.remember(text, read)
        piece = read.removesuffix(name)
        if piece:
            text.pieces.append(piece)
        return Written(number, token, piece)

    def _end_finished(self, active: list[int], step: AssistedStep) -> None:
        """See which texts are finished, and free what they hold."""
        for row, number in enumerate(active):
            text = self._texts[number]
            text.finish_reason = self._stopping.reason(number, text, step.fused.logits[row : row + 1])
            if text.finish_reason is not None:
                self._release(number)

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
        self._main.close()
        self._assistants.close()
        if self._streamer is not None:
            self._streamer.end()  # whoever reads from it must not wait for ever
            self._streamer = None
        if self._trace is not None:
            self._trace.close()
        self._team.save_rows()
