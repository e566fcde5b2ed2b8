"""Choosing an ensemble's weights, settings and main model from dev items, within a budget of minutes.

The measure is the likelihood of the right continuations in bits a byte, so that different main models
compare. Each item is read once by all members; a configuration then costs its fusion steps alone. All
configurations are measured on the same items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from deepen_ext.errors import InputError
from deepen_ext.fusers import FuseFunction, Fuser, fuser_class
from deepen_ext.fusers.settings import SHARPNESS
from deepen_ext.ground.numbers import real_number, true_or_false
from deepen_ext.measure.tuning.configurations import (
    Configuration,
    OutOfTime,
    Space,
    choose,
    from_likelihood,
    paired_difference,
    proportional,
    search,
)
from deepen_ext.measure.tuning.dev_items import DevSet
from deepen_ext.measure.tuning.dev_measurements import Measurements
from deepen_ext.measure.tuning.fit_gate import FittedGate, check_gate_fuser
from deepen_ext.members.loading import Progress
from deepen_ext.members.member import Member, unique_names
from deepen_ext.presets import Preset
from deepen_ext.space.recipes import RECIPES, Recipe

Ended = Literal["finished", "ended by the time", "interrupted"]


@dataclass(frozen=True)
class Tuning:
    """What was tried, on which items, and the choice.

    Attributes:
        space: the configurations there were.
        names: the members', as named.
        backends: what computes each member.
        sizes: bytes of each item that was read.
        alone: of each member, the bits of each item by itself.
        accuracy: of each member, the share of `answered` items it has right; () where it was not measured.
        answered: how many items that is.
        tried: bits of each item by configuration, in the order they were tried.
        chosen: one of them.
        ended: how the search ended. Ended before its end, it chooses from what was tried by then.
        gate: the one fitted for the chosen configuration; None where none was asked for.
    """

    space: Space
    names: tuple[str, ...]
    backends: tuple[str, ...]
    sizes: tuple[int, ...]
    alone: tuple[tuple[float, ...], ...]
    accuracy: tuple[float, ...]
    answered: int
    tried: Mapping[Configuration, tuple[float, ...]]
    chosen: Configuration
    ended: Ended
    gate: FittedGate | None = None

    @property
    def baseline(self) -> Configuration:
        """Uniform weights and the defaults, with the main model that is best with them."""
        return min((self.space.default(main) for main in range(len(self.names))), key=self.bits_per_byte)

    def bits_per_byte(self, one: Configuration) -> float:
        """Of the right continuations under a configuration."""
        return sum(self.tried[one]) / sum(self.sizes)

    def alone_bits_per_byte(self) -> list[float]:
        """Of the right continuations, for each member by itself."""
        return [sum(bits) / sum(self.sizes) for bits in self.alone]

    def difference(self, one: Configuration, other: Sequence[float] | None = None) -> tuple[float, float]:
        """Bits a byte above the baseline (or above such a list of bits), and the standard error."""
        return paired_difference(self.tried[one], other or self.tried[self.baseline], self.sizes)

    def preset(
        self,
        named: Sequence[str | Path],
        dev: DevSet,
        fuser: str,
        loading: Mapping[str, Any] | None = None,
    ) -> Preset:
        """The choice as a preset, with what was measured; with the gate if that helps.

        Args:
            named: the members as the caller named them.
            dev: the items.
            fuser: as the caller named it.
            loading: the options that the members were loaded with, as `load_members` takes them. Those
                that a preset can have go into it.
        """
        one = self.chosen
        given: dict[str, Any] = {"weights": [round(weight, 6) for weight in one.ordered_weights()]}
        given["fuser"] = fuser.partition(":")[0] if one.recipe else fuser
        settings: dict[str, Any] = {
            "recipe": one.recipe,
            "learning_rate": one.learning_rate,
            "relative_temperature": one.temperature,
            "confidence": one.confidence or None,
        }
        if self.gate is not None and self.gate.helps:
            settings |= {"weighing": "gate", "confidence": None, "gate": list(self.gate.numbers)}
        given |= {name: value for name, value in settings.items() if value is not None}
        ordered = {
            name: [value[i] for i in one.order()] if isinstance(value, list | tuple) else value
            for name, value in (loading or {}).items()
            if name != "trust_remote_code" and value is not None
        }
        return Preset([str(named[i]) for i in one.order()], given, self._measured(dev), ordered)

    def _measured(self, dev: DevSet) -> dict[str, Any]:
        def by_name(values: Sequence[float]) -> dict[str, float]:
            return {name: round(value, 5) for name, value in zip(self.names, values, strict=True)}

        uniform = [self.bits_per_byte(self.space.default(main)) for main in range(len(self.names))]
        difference, error = self.difference(self.chosen)
        found: dict[str, Any] = {"task": dev.name, "split": "dev"} if dev.task else {"text": dev.name}
        found |= {"items": len(self.sizes), "bytes": sum(self.sizes)}
        found["bits_per_byte"] = {
            "single": by_name(self.alone_bits_per_byte()),
            "uniform, by main model": by_name(uniform),
            "chosen": round(self.bits_per_byte(self.chosen), 5),
        }
        found["chosen_against_best_uniform"] = {
            "difference": round(difference, 5),
            "standard_error": round(error, 5),
        }
        if self.accuracy:
            found["accuracy"] = {"items": self.answered, "single": by_name(self.accuracy)}
        if self.gate is not None:
            found["gate"] = self._gate_measured(self.gate)
        found["tried"] = len(self.tried)
        found["weights_from"] = self.chosen.source
        found["search"] = self.ended
        found["backends"] = dict(zip(self.names, self.backends, strict=True))
        found["versions"] = {one: metadata.version(one) for one in ("deepen-ext", "torch", "transformers")}
        found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return found

    @staticmethod
    def _gate_measured(gate: FittedGate) -> dict[str, Any]:
        with_gate, without = gate.bits_per_byte()
        difference, error = gate.difference
        return {
            "tokens": gate.tokens,
            "held_out_bits_per_byte": {"with": round(with_gate, 5), "without": round(without, 5)},
            "difference": round(difference, 5),
            "standard_error": round(error, 5),
            "written": gate.helps,
        }


def check_minutes(value: Any) -> float:
    """The value as a float; InputError where it is out of range."""
    return real_number("minutes", value, "a budget above 0", lambda x: 0 < x < float("inf"))


def check_tunable(fuser: str | FuseFunction, members: int, gate: bool) -> type[Fuser]:
    """The class of a fuser whose settings can be chosen; seen before models are loaded.

    Args:
        fuser: as `tune` takes it.
        members: how many.
        gate: whether a gate is to be fitted.

    Raises:
        InputError: see `tune`.
    """
    if fuser == "auto":
        raise InputError("fuser='auto' stands for one of several; name the one to tune, such as deepen")
    kind = fuser_class(fuser)
    if members < 2 or kind.fewest_members < 2:
        raise InputError("a model alone has nothing to tune; name two or more, and a fuser of theirs")
    if gate:
        check_gate_fuser(kind)
    if kind.spans:
        raise InputError(f"fuser='{kind.name}' has no likelihood to tune by; tune another fuser")
    if kind.draws:
        raise InputError(
            f"fuser='{kind.name}' has the likelihood of union-vocab; tune that, and use its weights"
        )
    return kind


def tune(
    members: Sequence[Member],
    dev: DevSet,
    *,
    minutes: float = 10.0,
    fuser: str | FuseFunction = "deepen",
    recipes: Sequence[Recipe] = RECIPES,
    gate: bool = False,
    progress: Progress | None = None,
) -> Tuning:
    """Choose a configuration on dev items.

    At most half of the time goes into reading, and less where the search would then not have time for some
    thirty configurations on all items that were read. Two items are read, and the uniform configuration is
    measured with each main model, however short the time is. An interrupt (SIGINT) during the search ends it
    as the time does; one during the gate's fit leaves the gate out. Before that there is nothing to choose
    from, and it goes on to the caller.

    Args:
        members: two or more, in any order.
        dev: the items.
        minutes: the budget, from this call on.
        fuser: what is tuned; where it uses recipes, also recipe, learning rate and temperature.
        recipes: those that may be chosen, the default first.
        gate: fit a gate for the chosen configuration too (see `fit_gate`), after the budget: it takes about
            as long as measuring as many configurations as there are members, and one more.
        progress: called with a line of text as each stage goes on.

    Raises:
        InputError: fewer than two members; "auto", a fuser of the main model alone, one that writes words or
            draws members; a gate for a fuser that cannot have a fitted one; no time; an item that exceeds a
            member's context; items that have probability 0 whatever is tried; and what `Ensemble` raises.
        ModelError: a member's forward pass failed.
    """
    minutes = check_minutes(minutes)
    kind = check_tunable(fuser, len(members), true_or_false("gate", gate))
    if kind.uses_recipe and not recipes:
        raise InputError("there are no recipes; name those that may be chosen")
    space = Space(len(members), tuple(recipes) if kind.uses_recipe else ())
    work = Measurements(list(members), dev, space, fuser, minutes * 60, progress or (lambda _: None))
    work.check_items()
    work.read()
    accuracy, answered = work.accuracy()
    found = {"accuracy": proportional(accuracy), "likelihood": from_likelihood(work.alone, SHARPNESS)}
    informed = {source: weights for source, weights in found.items() if weights is not None}
    uniform = [space.default(main) for main in range(len(members))]
    start = min(uniform, key=lambda one: sum(work.tried[one]))
    ended: Ended = "finished"
    try:
        search(start, space, informed, work.measure)
    except OutOfTime:
        ended = "ended by the time"
    except KeyboardInterrupt:
        ended = "interrupted"
    work.check_possible()
    chosen = choose(work.tried, space, work.sizes)
    fitted = None
    if gate and ended != "interrupted":
        try:
            fitted = work.gate(chosen)
        except KeyboardInterrupt:
            ended = "interrupted"
    if ended != "interrupted":  # which may have come in the middle of a row
        with suppress(KeyboardInterrupt):  # a cache is not worth what was found
            work.save_rows()
    return Tuning(
        space=space,
        names=tuple(unique_names(members)),
        backends=tuple(member.backend.describe().backend for member in members),
        sizes=tuple(work.sizes),
        alone=tuple(tuple(bits) for bits in work.alone),
        accuracy=tuple(accuracy),
        answered=answered,
        tried={one: tuple(bits) for one, bits in work.tried.items()},
        chosen=chosen,
        ended=ended,
        gate=fitted,
    )
