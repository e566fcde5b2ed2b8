"""What `tune` measures on dev items: the members by themselves, and configurations of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, shown
from deepen_ext.fusers import FuseFunction
from deepen_ext.measure.evaluation.tasks import Item, Task
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.tuning.configurations import Configuration, OutOfTime, Space
from deepen_ext.measure.tuning.dev_items import DevItem, DevSet
from deepen_ext.measure.tuning.fit_gate import NO_GATE, FittedGate, GateEvidence, fit_gate
from deepen_ext.members.loading import Progress
from deepen_ext.members.member import Member
from deepen_ext.members.memory import available_bytes
from deepen_ext.space.recipes import Recipe

READING_SHARE = 0.5  # of the budget, for reading the items and for the members' own accuracy
_CHECKING_SHARE = 0.1  # of it, for seeing that items can be read
_LIKELIHOOD_SHARE = 0.35  # of it for reading, where accuracy needs generations of its own
_CONFIGURATIONS = 30  # as many the search should have time for
_AT_ONCE = 8  # items whose answers are generated together


@dataclass
class Measurements:
    """What is measured on the dev items: the members alone, and every configuration that is tried.

    Attributes:
        members: as named.
        dev: the items.
        space: the configurations there are.
        fuser: what is tuned.
        seconds: the budget, from now on.
        say: called with a line of text as each stage goes on.
        sizes: bytes of each item that was read.
        alone: of each member, the bits of each of these items by itself.
        tried: bits of each of these items by configuration.
    """

    members: Sequence[Member]
    dev: DevSet
    space: Space
    fuser: str | FuseFunction
    seconds: float
    say: Progress

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._ensembles: dict[tuple[int, Recipe | None, float | None], Ensemble] = {}
        self._readings: list[TextReading] = []
        self._timed = (0.0, 0)  # seconds that fusion took for so many bytes that had been read
        self._first_choice = [0] * len(self.members)  # items whose continuation a member alone would write
        self.sizes: list[int] = []
        self.alone: list[list[float]] = [[] for _ in self.members]
        uniform = map(self.space.default, range(len(self.members)))
        self.tried: dict[Configuration, list[float]] = {one: [] for one in uniform}

    def check_items(self) -> None:
        """That every member can read every item: an error at the last one would cost what was measured.

        A text of many megabytes is looked at for a share of the budget alone. Reading takes longer, and so
        hardly comes further.

        Raises:
            InputError: one cannot; the message says which item.
        """
        self.say("Checking dev items")
        for item in self.dev.items:
            if self._spent() > _CHECKING_SHARE * self.seconds:
                return
            try:
                TextReading(self.members, item.context, item.text)
            except InputError as error:
                where = f"a piece that begins with {shown(item.text, 40)}"
                if item.item is not None:
                    where = f"line {item.item.index + 1} of dev.jsonl"
                raise InputError(
                    f"{self.dev.name}, {where}: {error}. Or leave that text out, or take other models"
                ) from error

    def read(self) -> None:
        """Read items and measure the uniform configurations, until that share of the budget is spent."""
        share = _LIKELIHOOD_SHARE if self._writes_answers() else READING_SHARE
        memory = self._memory()
        for number, item in enumerate(self.dev.items):
            if number >= 2 and (
                self._spent() > share * self.seconds
                or self._search_seconds() > self.seconds - self._spent()
                or self._memory() < memory / 2
            ):
                break
            self.say(f"Reading dev items, {number} of {len(self.dev.items)}")
            self._read(item, time_it=number & (number - 1) == 0)
        self._readings[-1].release()  # every row that a configuration can ask for is known now

    def check_possible(self) -> None:
        """That the configurations can be compared: of those that were tried, one has all items possible.

        Raises:
            InputError: none has, so all have infinitely many bits.
        """
        if any(math.isfinite(sum(bits)) for bits in self.tried.values()):
            return
        item = next(iter(self.tried.values())).index(math.inf)
        raise InputError(
            "with every configuration that was tried some dev item has probability 0, such as "
            f"{shown(self._readings[item].text)}, so they cannot be compared; leave such items out, or tune "
            "another fuser"
        )

    def _spent(self) -> float:
        """Seconds of the budget."""
        return time.monotonic() - self._began

    def _writes_answers(self) -> bool:
        """Whether a member's answer is more than the token that reading an item has settled already."""
        return self.dev.task is not None and self.dev.task.max_new_tokens > 1

    def _read(self, item: DevItem, *, time_it: bool) -> None:
        reading = TextReading(self.members, item.context, item.text)
        if self._readings:
            reading.go_on_from(self._readings[-1])  # items of a task often begin alike
        size = len(reading.text.encode())
        for i, member in enumerate(self.members):
            found = reading.member(member)
            self.alone[i].append(-found.total / math.log(2))
            self._first_choice[i] += all(found.greedy)
        for one, bits in self.tried.items():
            reading.read_ahead(self.ensemble(one))
            bits.append(self._bits(reading, self.ensemble(one), one))
        if time_it:  # what the item costs a configuration when everything has been read
            seconds, timed = self._timed
            one = next(iter(self.tried))
            began = time.monotonic()
            self._bits(reading, self.ensemble(one), one)
            self._timed = seconds + time.monotonic() - began, timed + size
        self._readings.append(reading)
        self.sizes.append(size)

    def _search_seconds(self) -> float:
        """What a search over the items read so far takes."""
        seconds, timed = self._timed
        return _CONFIGURATIONS * sum(self.sizes) * seconds / timed

    def _memory(self) -> int:
        return min(available_bytes(device) for device in {one.device for one in self.members})

    def accuracy(self) -> tuple[list[float], int]:
        """Of each member the share of items it answers right, and of how many: as many as time allows."""
        task = self.dev.task
        if task is None:
            return [], 0
        right, answered = self._first_choice, len(self.sizes)
        if self._writes_answers():
            right, answered = self._answered(task)
        return [count / answered for count in right] if answered else [], answered

    def _answered(self, task: Task) -> tuple[list[int], int]:
        """How many items each member answers right, and of how many."""
        right, answered = [0] * len(self.members), 0
        alone = [Ensemble([member], fuser="single") for member in self.members]
        items = [one.item for one in self.dev.items[: len(self._readings)] if one.item is not None]
        for begin in range(0, len(items), _AT_ONCE):
            batch = items[begin : begin + _AT_ONCE]
            self.say(f"Answering dev items, {begin} of {len(items)}")
            try:
                found = [sum(map(task.correct, self._answers(task, one, batch), batch)) for one in alone]
            except OutOfTime:
                break
            right = [a + b for a, b in zip(right, found, strict=True)]
            answered += len(batch)
        return right, answered

    def _answers(self, task: Task, alone: Ensemble, items: Sequence[Item]) -> list[str]:
        """What a member writes after the prompts.

        Raises:
            OutOfTime: the time for answers is up before its end.
        """
        prompts, stops = [one.prompt for one in items], list(task.stop_strings)
        run = alone.start(prompts, max_new_tokens=task.max_new_tokens, stop_strings=stops or None)
        with closing(run):
            for _ in run:
                if self._spent() > READING_SHARE * self.seconds:
                    raise OutOfTime
        return [one.text for one in run.results()]

    def measure(self, one: Configuration) -> float:
        """Total bits of the items under a configuration.

        Raises:
            OutOfTime: the budget ended before the last item; then it counts as not tried.
        """
        if one not in self.tried:
            self.say(f"Trying configuration {len(self.tried) + 1}")
            bits = []
            for reading in self._readings:
                if self._spent() >= self.seconds:
                    raise OutOfTime
                bits.append(self._bits(reading, self.ensemble(one), one))
            self.tried[one] = bits
        return sum(self.tried[one])

    def _bits(self, reading: TextReading, ensemble: Ensemble, one: Configuration) -> float:
        return -reading.fused(ensemble, one.ordered_weights(), greedy=False).total / math.log(2)

    def gate(self, one: Configuration) -> FittedGate:
        """A gate for a configuration that was tried."""
        ensemble = self.ensemble(replace(one, confidence=0.0)).variant(weighing="gate", gate=NO_GATE)
        items: list[GateEvidence] = []
        for reading in self._readings:
            self.say(f"Fitting a gate, {len(items)} of {len(self._readings)} dev items seen")
            items.append(GateEvidence.of(reading, ensemble, one.ordered_weights()))

        def measure(gate: tuple[float, ...], which: slice) -> list[float]:
            gated = ensemble.variant(gate=gate)
            return [self._bits(reading, gated, one) for reading in self._readings[which]]

        return fit_gate(items, self.tried[one], self.sizes, measure)

    def save_rows(self) -> None:
        """Keep the relative rows that were computed: most of what another call takes."""
        for one in self._ensembles.values():
            one.save_rows()

    def ensemble(self, one: Configuration) -> Ensemble:
        """An ensemble with the configuration's main model and settings; its weights are left out."""
        key = one.main, one.recipe, one.temperature
        if key not in self._ensembles:
            order = [self.members[i] for i in one.order()]
            given: dict[str, Any] = {"recipe": one.recipe, "relative_temperature": one.temperature}
            self._ensembles[key] = Ensemble(order, fuser=self.fuser, **(given if one.recipe else {}))
        rate = {} if one.learning_rate is None else {"learning_rate": one.learning_rate}
        return self._ensembles[key].variant(confidence=one.confidence, **rate)
