"""The loop: for every row of a batch main model's logits, assistants' word, a token, its text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.assistants import Assistants, AssistedStep, Reason
from deepen_ext.decoding.certificate import Certificate
from deepen_ext.decoding.generation import FinishReason, Generation, Timings
from deepen_ext.decoding.one_reader import OneReader
from deepen_ext.decoding.prompt_weights import prompt_weights, read_prompts
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards, open_session
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.trace import Trace
from deepen_ext.errors import InputError
from deepen_ext.fusers import DeepenFuser, Part
from deepen_ext.ground.numbers import real_number, whole_number
from deepen_ext.members.memory import find_shortage


@dataclass(frozen=True)
class Written:
    """A token that was written, and the characters it completed ("" while one is unfinished)."""

    row: int
    token: int
    text: str


@dataclass
class _Row:
    ids: list[int]  # the main model's: prompt and what was chosen; only assistants re-tokenise
    prompt_length: int
    new_tokens: int  # at most so many
    pieces: list[str] = field(default_factory=list)
    recent: str = ""  # the end of the new text with special tokens' names, for stop strings
    changed: int = 0
    finish_reason: FinishReason | None = None

    @property
    def written(self) -> int:
        return len(self.ids) - self.prompt_length


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
            team: whose members write.
            prompts: one for each row.
            settings: of the decoding.
            certified_skip: ask the assistants only where they can change a greedy token.
            confidence_gate: nor where the main model's first choice has at least this probability.
            trace: a file or a function that is told every token (see `Trace`).
            streamer: one of transformers', for a single row.
            shared: forwards to share with other runs over the same prompts.
            batch_size: how many rows are written at once; None for all. The others wait: the next one begins
                where one ends (continuous batching; Orca, Yu et al., OSDI 2022).

        Raises:
            InputError: no prompts, a setting that does not fit, a prompt that with its new tokens exceeds
                some member's context, or a batch that exceeds the memory.
        """
        if not prompts:
            raise InputError("there are no prompts; give one or more")
        if certified_skip and settings.do_sample:
            raise InputError(
                "certified_skip holds for greedy decoding only; for sampling use confidence_gate, "
                "which is not exact"
            )
        fuser = team.fuser
        if certified_skip and not isinstance(fuser, DeepenFuser):
            raise InputError(f"certified_skip bounds the inverse search, which {team.method} has not")
        if confidence_gate is not None:
            real_number("confidence_gate", confidence_gate, "above 0 to 1", lambda x: 0 < x <= 1)
        if streamer is not None and len(prompts) > 1:
            raise InputError("a streamer takes one prompt; leave it out, or give the prompts one at a time")
        if batch_size is not None:
            batch_size = whole_number("the batch size", batch_size, 1)
        self._team = team
        self.settings = settings
        self._rows = [
            _Row(list(one.main_ids), len(one.main_ids), settings.new_tokens(len(one.main_ids)))
            for one in prompts
        ]
        longest = max(row.new_tokens for row in self._rows)
        at_once = min(batch_size or len(prompts), len(prompts))
        self._active = list(range(at_once))
        self._waiting = deque(range(at_once, len(prompts)))
        self._begun = list(self._active)  # since the last step
        self._assistants = Assistants(
            team,
            [prompt.texts for prompt in prompts],
            lanes=at_once,
            new_tokens=longest,
            shared=shared,
        )
        for number, prompt in enumerate(prompts):
            self._assistants.append(number, prompt.unfinished)
        self._check_lengths(shared)
        self._assistants.open()
        self._trace = None if trace is None else Trace(trace)
        capacity = max(row.prompt_length + row.new_tokens for row in self._rows)
        self._main = open_session(team.main, at_once, capacity, shared)
        main = team.main
        named = main.special_in(settings.every_stop_string)  # they end the text, so they can be written
        self._unwritable = main.unwritable([*settings.eos_ids, *named])
        self._shared = shared is not None
        self._chooser = Chooser(settings, [prompt.main_ids for prompt in prompts], team.device)
        self._criteria = [settings.criteria() for _ in prompts]
        self._certificate = (
            Certificate(fuser.learning_rate, fuser.steps, self._chooser, log_probs=fuser.log_probs)
            if certified_skip and isinstance(fuser, DeepenFuser)
            else None
        )
        self._gate = confidence_gate
        self._cancelled = False
        self._streamer = streamer
        self._longest_stop = max(map(len, settings.stop_strings), default=0)
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
        """What was written, row by row."""
        return [
            Generation(
                text="".join(row.pieces),
                token_ids=row.ids[row.prompt_length :],
                finish_reason=row.finish_reason or "cancelled",
                changed_tokens=row.changed,
                timings=self._timings,
            )
            for row in self._rows
        ]

    @property
    def timings(self) -> Timings:
        """Of the whole batch."""
        return self._timings

    def _write(self) -> Generator[list[Written], None, None]:
        began = perf_counter()
        try:
            if self._streamer is not None:
                self._streamer.put(torch.tensor([self._rows[0].ids]))
            while not self._cancelled and self._drop_full():
                written = self._step()
                spent = (perf_counter() - began) * 1e3
                self._timings.step_ms.append(spent)
                self._timings.total_ms += spent  # the time between the steps is the reader's
                if self._timings.steps == 1:
                    self._end_of_prompt()
                yield written
                began = perf_counter()
            rest = [self._end_of_text(row) for row in range(len(self._rows))]
            if any(one.text for one in rest):
                yield [one for one in rest if one.text]
        finally:
            self._free()  # also after an interrupt: what was computed is not lost

    def _step(self) -> list[Written]:
        """One token for every row that is not finished."""
        rows, timings, names = list(self._active), self._timings, self._team.names
        began = perf_counter()
        if self._begun and self._team.weighs_prompts:
            self._weigh_prompts(self._begun)
        self._begun = []
        targets = {self._assistants.lanes[row]: self._rows[row].ids for row in rows}
        said = self._main.ask(targets, self._team.fuser.candidates).wait()
        # What a session of its own gives nobody else reads.
        said = said.without(self._unwritable, in_place=not self._shared)
        read = perf_counter()
        main = self._team.fuser.part(0, said)
        step = self._assistants.step(main, rows, unneeded=self._unneeded(main))
        fused = perf_counter()
        ids = [self._rows[row].ids for row in rows]
        chosen = self._chooser.choose(step.fused.logits, rows, ids, step.fused.chosen)
        tokens, main_choices = step.fused.read(chosen)
        sampled = perf_counter()
        stages = {
            "fusion": (fused - read) * 1e3 - sum(step.members_ms.values()) - step.handoff_ms,
            "handoff": step.handoff_ms,
            "sampling": (sampled - fused) * 1e3,
        }
        members_ms = {names[0]: (read - began) * 1e3, **step.members_ms}
        if self._trace is not None:
            positions = [self._rows[row].written for row in rows]
            self._trace.step(self._team, step, rows, positions, tokens, {"members": members_ms, **stages})
        explained = perf_counter()  # writing the trace is no stage
        for row, token, main_choice in zip(rows, tokens, main_choices, strict=True):
            self._rows[row].ids.append(token)
            self._rows[row].changed += token != main_choice
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens))
        written = [self._hand_over(row, token) for row, token in zip(rows, tokens, strict=True)]
        self._end_rows(written, step)
        for name, spent in members_ms.items():
            timings.members_ms[name] += spent
        timings.fusion_ms += stages["fusion"]
        timings.sampling_ms += stages["sampling"]
        timings.handoff_ms += step.handoff_ms + (perf_counter() - explained) * 1e3
        timings.steps += 1
        timings.tokens += len(rows)
        timings.settled += step.reasons.count("settled")
        timings.gated += step.reasons.count("gated")
        return written

    def _weigh_prompts(self, rows: list[int]) -> None:
        """Each row's weights from how well the members read its prompt."""
        team = self._team
        ids = {self._assistants.lanes[row]: self._rows[row].ids for row in rows}
        main = read_prompts(self._main, team.main, ids).values()
        for row, *scores in zip(rows, main, *self._assistants.read_prompts(rows), strict=True):
            self._assistants.weights[row] = prompt_weights(scores, team.weights)

    def _unneeded(self, main: Part) -> list[Reason | None]:
        """Of each active row, why its token needs no assistant, or None."""
        reasons: list[Reason | None] = [None] * len(self._active)
        if self._gate is not None:
            sure = (main.topk.probs[:, 0] >= self._gate).tolist()
            reasons = ["gated" if one else None for one in sure]
        if self._certificate is not None:
            ids = [self._rows[row].ids for row in self._active]
            settled = self._certificate.settled(main.said.scores(), self._active, ids, top=main.topk).tolist()
            reasons = ["settled" if one else old for one, old in zip(settled, reasons, strict=True)]
        return reasons

    def _hand_over(self, row: int, token: int) -> Written:
        """Give the token's text to the assistants; a special token has none, and they read its name."""
        if token in self.settings.eos_ids:
            return Written(row, token, "")
        main, longest = self._team.main, self._longest_stop
        data = main.vocabulary.bytes_of(token)
        name = "" if data else main.name_of(token)
        read = self._assistants.append(row, data or name.encode())
        if longest:
            self._rows[row].recent = (self._rows[row].recent + read)[-(longest + len(read)) :]
        piece = read.removesuffix(name)
        if piece:
            self._rows[row].pieces.append(piece)
        return Written(row, token, piece)

    def _end_rows(self, written: list[Written], step: AssistedStep) -> None:
        """See which rows are finished, and free what they hold."""
        for i, one in enumerate(written):
            row = self._rows[one.row]
            if one.token in self.settings.eos_ids:
                row.finish_reason = "eos"
            elif any(stop in row.recent for stop in self.settings.stop_strings):
                row.finish_reason = "stop_string"
            elif self._criteria[one.row] and bool(
                self._criteria[one.row](torch.tensor([row.ids]), (step.fused.logits[i : i + 1],)).all()
            ):
                row.finish_reason = "stopping_criteria"
            elif row.written >= row.new_tokens:
                row.finish_reason = "length"
            if row.finish_reason is not None:
                self._release(one.row)

    def _drop_full(self) -> bool:
        """End the rows that some member cannot read any more; whether any row is left."""
        for number in list(self._active):
            row = self._rows[number]
            if not self._team.main.fits(len(row.ids)) or not self._assistants.fits(number):
                row.finish_reason = "context"
                self._release(number)
        return bool(self._active)

    def _release(self, row: int) -> None:
        index = self._active.index(row)
        following = self._waiting.popleft() if self._waiting else None
        if following is None:
            del self._active[index]
            self._main.release(self._assistants.lanes[row])
        else:
            self._active[index] = following  # in the order of the places, so that no logits are copied
            self._begun.append(following)
        self._assistants.release(row, following)

    def _end_of_text(self, number: int) -> Written:
        rest = self._assistants.finish(number)
        if rest:
            self._rows[number].pieces.append(rest)
        return Written(number, self._rows[number].ids[-1], rest)

    def _end_of_prompt(self) -> None:
        """Put the first step's time under the prompt, so that the rest are times a token."""
        timings = self._timings
        timings.prompt_ms = timings.total_ms
        timings.members_ms = dict.fromkeys(timings.members_ms, 0.0)
        timings.fusion_ms = timings.handoff_ms = timings.sampling_ms = 0.0

    def _free(self) -> None:
        self._main.close()
        self._assistants.close()
        if self._streamer is not None:
            self._streamer.end()  # whoever reads from it must not wait for ever
            self._streamer = None
        if self._trace is not None:
            self._trace.close()
        self._team.save_rows()

    def _check_lengths(self, shared: SharedForwards | None) -> None:
        """That every prompt with its new tokens fits every member's context, and the batch the memory."""
        members = self._team.members
        longest = [0] * len(members)
        for number, row in enumerate(self._rows):
            lengths = [row.prompt_length, *self._assistants.tokens(number)]
            new = row.new_tokens
            for i, (member, length) in enumerate(zip(members, lengths, strict=True)):
                longest[i] = max(longest[i], length + new)
                limit = member.context_length
                if limit is not None and length + new > limit:
                    which = (
                        f"the prompt's {length}" if len(self._rows) == 1 else f"prompt {number}'s {length}"
                    )
                    raise InputError(
                        f"{member.name}: {which} tokens and {new} new ones exceed its context of {limit}; "
                        f"shorten the prompt or ask for at most {max(limit - length, 0)}"
                    )
        rows = len(self._active)
        held = None if shared is None else shared.bytes_held
        if (short := find_shortage(rows, zip(members, longest, strict=True), held)) is not None:
            fewer = "choose a smaller batch_size, or " if rows > 1 else ""
            raise InputError(
                f"{rows} prompts at a time, with their new tokens up to {max(longest)} long, {short}; "
                f"{fewer}ask for fewer new tokens"
            )
