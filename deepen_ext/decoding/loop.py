"""The loop: cycles (cycle.py) until all texts have ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.cycle import Cycles
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.decoding.one_reader import OneReader
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import Written
from deepen_ext.decoding.trace import Trace
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number


class Run(Cycles):
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
        super().__init__(
            team,
            settings,
            prompts,
            min(batch_size or len(prompts), len(prompts)),
            drafts=drafts,
            shared=shared,
            observer=None if trace is None else partial(Trace, trace),
            skipping={"certified_skip": certified_skip, "confidence_gate": confidence_gate},
        )
        self._streamer = streamer
        self._cancelled = False
        self._steps = OneReader(self._write())

    def __iter__(self) -> Iterator[list[Written]]:
        return self._steps

    def close(self) -> None:
        """Stop, free all caches, and keep the relative rows that were computed."""
        self._cancelled = True
        if self._steps.close():
            self._free()
        # Else another thread is in a step, or this one's callback: the loop ends after it, and frees.

    def _write(self) -> Generator[list[Written], None, None]:
        began = perf_counter()
        try:
            if self._streamer is not None:
                self._streamer.put(torch.tensor([self._texts[0].ids], device="cpu"))
            while not self._cancelled and self._end_full():
                written = self._cycle()
                spent = (perf_counter() - began) * 1e3
                self._timings.step_ms.append(spent)
                self._timings.total_ms += spent  # the time between the steps is the reader's
                if self._timings.steps == 1:
                    self._timings.end_of_prompt()
                if self._streamer is not None:
                    for one in written:
                        self._streamer.put(torch.tensor([one.token], device="cpu"))
                yield written
                if (failure := self._acceptor.take_failure()) is not None:
                    raise failure
                began = perf_counter()
            rest = [self._end_of_text(number) for number in self._texts]
            if any(one.text for one in rest):
                yield [one for one in rest if one.text]
        finally:
            self._free()  # also after an interrupt: what was computed is not lost

    def _free(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end modules are emptied already, and their names are None: here an argument
        # holds the function. What a run holds goes with the process.
        if ending():
            return
        try:
            super()._free()
        finally:
            if self._streamer is not None:
                self._streamer.end()  # whoever reads from it must not wait for ever
                self._streamer = None
