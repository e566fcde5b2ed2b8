"""What the comparisons share: the four embedded models, the ensembles of them, and the ways of fusing.

An ensemble is written with the models' letters, the main model first: ``S+G``. A method is a fuser as the
command line names it, with changes after ``@``: ``default`` (its fuser and weights), ``deepen:bytes``,
``average@prompt`` (weights from the prompt), ``average@size`` (from the members' sizes and the prompt),
``average@prompt@sharpness=0.2``, ``deepen:bytes@main=0.7`` (the main model's weight; assistants share the
rest), ``deepen:calibrated@eta=0.3@tau=20`` (learning rate, temperature of the similarity rows),
``average@confidence=1`` (members count more where they are sure), ``average@margin``,
``average@consistency``, ``average@disagreement`` (other rules of weighing).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from deepen_ext import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import FusionSettings, map_settings, method_name, parse_fuser
from deepen_ext.fusers.weighing.make import RULES
from deepen_ext.fusers.weights import WEIGHTS_RULES, main_by_size
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

MODELS = {
    "S": "smollm2-135m-instruct",
    "G": "gemma-3-270m",
    "Q": "qwen2.5-coder-0.5b-instruct",
    "L": "qwen2.5-coder-1.5b-instruct",
}
ENSEMBLES = ("S+G", "G+S", "Q+G", "Q+S", "S+Q", "G+Q", "Q+G+S", "G+S+Q", "S+G+Q")
# Weights outside of the embeddings, by which the default finds the main model.
SIZES = {"S": 106_203_456, "G": 100_326_016, "Q": 357_898_112, "L": 1_310_340_608}
METHODS = (
    *("default", "deepen:calibrated", "deepen:bytes", "deepen:paper"),
    *("average", "union-topk", "union-vocab", "product", "consistent@consistency"),
    *("deepen@prompt", "union-vocab@prompt", "union-vocab@confidence=1", "union-vocab@margin"),
    *("union-vocab@disagreement", "deepen@disagreement", "follow@prompt"),
)
_DEFAULTS = FusionSettings().resolved(logits=True)
DEFAULT = f"{method_name(_DEFAULTS.fuser, _DEFAULTS.recipe)}@{_DEFAULTS.weights_rule}"
# Settings that no method's name tells.
ALIKE = ("learning_rate", "steps", "candidates", "boundary_aware")
_NUMBERS = {
    "eta": "learning_rate",
    "tau": "relative_temperature",
    "confidence": "confidence",
    "sharpness": "sharpness",
}
_RULES = [rule for rule in RULES if rule not in ("confidence", "gate")]


@dataclass(frozen=True)
class Method:
    """A way of fusing: its canonical name, and what it sets of an ensemble of so many members."""

    name: str
    settings: dict[str, Any]
    main_weight: float | None = None

    def of(self, members: int) -> dict[str, Any]:
        if self.main_weight is None:
            return self.settings
        rest = (1 - self.main_weight) / (members - 1)
        return {**self.settings, "weights": [self.main_weight] + [rest] * (members - 1)}


def parse_method(spec: str) -> Method:
    """A method as the module's docstring writes it.

    Raises:
        InputError: no such fuser or change.
    """
    spec = DEFAULT if spec == "default" else spec
    name, *changes = spec.split("@")
    fuser, recipe = parse_fuser(name, _DEFAULTS.recipe)
    # All of them: an ensemble is a variant of one by another method.
    settings = {key: getattr(_DEFAULTS, key) for key in ("weighing", *_NUMBERS.values())}
    settings |= {"fuser": fuser, "recipe": recipe, "weights": None}
    main_weight = None
    for change in changes:
        key, _, value = change.partition("=")
        if change in WEIGHTS_RULES:
            settings["weights"] = change
        elif change in _RULES:
            settings["weighing"] = change
        elif key == "main":
            main_weight = _number(spec, value)
        elif key in _NUMBERS:
            settings[_NUMBERS[key]] = _number(spec, value)
        else:
            known = [*WEIGHTS_RULES, "main=W", *(f"{one}=X" for one in _NUMBERS), *_RULES]
            raise InputError(f"method '{spec}': after @ there can be {', '.join(known)}")
    return Method("@".join([method_name(fuser, recipe), *changes]), settings, main_weight)


def _number(spec: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"method '{spec}': '{value}' is no number") from None


def letters_of(ensemble: str) -> list[str]:
    """The letters of an ensemble.

    Raises:
        InputError: an unknown letter, one twice, or fewer than two.
    """
    letters = ensemble.split("+")
    if set(letters) - set(MODELS) or len(set(letters)) != len(letters) or len(letters) < 2:
        raise InputError(f"ensemble '{ensemble}': two or more of {', '.join(MODELS)}, joined by +")
    return letters


def default_order(ensemble: str) -> str:
    """The ensemble that the default makes of these members, named in this order."""
    letters = letters_of(ensemble)
    main = letters.pop(main_by_size([SIZES[one] for one in letters]))
    return "+".join([main, *letters])


def load(ensembles: Iterable[str], **options: Any) -> dict[str, Member]:
    """The members of these ensembles by letter, in the order of `MODELS`.

    In transformers; the largest model on the CPU in llama.cpp, as its file has it.
    """
    needed = {letter for one in ensembles for letter in letters_of(one)}
    native = {"L": {"backend": "llama.cpp"}} if options.get("device", "cpu") == "cpu" else {}
    return {
        letter: load_member(f"demo:{name}", **native.get(letter, {"backend": "transformers", **options}))
        for letter, name in MODELS.items()
        if letter in needed
    }


def configurations(
    members: Mapping[str, Member], ensembles: Sequence[str], methods: Sequence[str]
) -> dict[str, Ensemble]:
    """By name: ``Q`` for a member alone, ``Q+G average`` for an ensemble; relative maps are shared."""
    found = {letter: Ensemble([member], fuser="single") for letter, member in members.items()}
    chosen = {one.name: one for one in map(parse_method, methods)}
    for letters in dict.fromkeys(ensembles):
        own = [members[letter] for letter in letters_of(letters)]
        made: dict[Any, Ensemble] = {}  # by what their relative rows are made by
        for method in chosen.values():
            settings = method.of(len(own))
            key = map_settings(_DEFAULTS.changed(**settings))
            one = made[key].variant(**settings) if key in made else Ensemble(own, **settings)
            made.setdefault(key, one)
            found[f"{letters} {method.name}"] = one
    return found


def add_options(parser: ArgumentParser) -> None:
    """Which ensembles and methods, and how long."""
    parser.add_argument("--ensembles", nargs="+", default=ENSEMBLES, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="begin nothing new after that many minutes")


class Deadline:
    """When to begin nothing new."""

    def __init__(self, options: Namespace) -> None:
        self._end = None if options.minutes is None else monotonic() + 60 * options.minutes

    def passed(self) -> bool:
        return self._end is not None and monotonic() >= self._end


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_default(where: Path, name: str, learning_rate: float | None) -> None:
    """That a configuration's results, if they are older, were made with the learning rate of now.

    Raises:
        InputError: they were not: the default has changed.
    """
    now = _DEFAULTS.learning_rate
    if learning_rate not in (None, now) and "@eta=" not in name:
        raise InputError(
            f"{where}: {name} was run with η {learning_rate}, and the default is {now} now; remove its "
            "results, or give another --work folder"
        )


def settings_used() -> dict[str, Any]:
    """What the results say about their settings."""
    return {
        "default_method": DEFAULT,
        "models": MODELS,
        "defaults": {key: getattr(_DEFAULTS, key) for key in ALIKE},
    }


def alike(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results must have the same to stand side by side, of their `settings_used`.

    Which method was the default when they were made does not count: every method stands by its name.
    """
    return tuple(settings["defaults"][key] for key in ALIKE)
