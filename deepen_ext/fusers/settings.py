"""The settings of an ensemble: each name, default and range in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.make import check_weighing
from deepen_ext.fusers.weights import WeightsRule, check_weights, check_weights_rule, read_weights
from deepen_ext.ground.numbers import real_number, true_or_false, whole_number
from deepen_ext.space.recipes import (
    DEFAULT_ENTRIES,
    DEFAULT_LEARNING_RATE,
    DEFAULT_RECIPE,
    Recipe,
    check_recipe,
    check_temperature,
)

OnFailure = Literal["stop", "continue"]

SHARPNESS = 1 / 16  # set by reasoning, not by a search: docs/results.md

# (main model's logits [b, V_main], what the members say, weights float32 [b, n]) -> new logits [b, V_main]
FuseFunction = Callable[[torch.Tensor, Sequence[Said], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FusionSettings:
    """What `Ensemble(members, **settings)` takes.

    A range holds whether or not the fuser uses the setting. Whether the settings go with the members is seen
    later: the number of weights by `member_weights`, the members' backends by `check_capabilities`.

    Attributes:
        weights: lambda_i, one for each member, summing to 1. None: equal weights, but for "auto" and "follow"
            (see `resolved`). "prompt": found for each prompt, from how well each member reads it (see
            `prompt_weights`). "size": the same, but not from equal weights: from those of the members' sizes
            (see `weights_by_size`).
        sharpness: of weights "prompt" and "size", 0 to 10: how much more a member counts for each nat by
            which it reads the prompt better.
        fuser: a name of `FUSERS`, such as "deepen", "average", "draw" (with sampling only), "spans" (greedy
            only) or "single" (the main model alone: one member is enough, and others are not used). Or a
            function of your own (see `FunctionFuser`). "auto": see `resolved`.
        recipe: how tokens are placed in the relative space: "bytes", "calibrated" or "paper". Of "deepen"
            and "follow", as the next two and `steps` are.
        learning_rate: eta of the inverse search, above 0 to 10; the paper uses 0.1 to 0.5.
        relative_temperature: of the similarity rows, above 0 to 1000; None for the recipe's own (calibrated
            40, paper 100; bytes has none).
        weighing: the rule by which members count more or less at a token, by what they say there; a name of
            `deepen_ext.fusers.weighing`. "confidence" has a strength, the next setting.
        confidence: how much more a member counts at a token where it is sure, 0 to 10: its weight is scaled
            by exp(-confidence H), H the entropy of its distribution in nats. 0: the weights as they are.
        gate: the four numbers of weighing="gate", as `tune` finds them (see `Gate`).
        steps: T of the inverse search, 1 to 64.
        candidates: how many of a member's most probable tokens are looked at one by one, 1 or more.
        entries: how many of a relative row's largest entries are kept, 1 or more.
        min_probability: less probable tokens are not worth a relative row, 0 to below 1 (see `DeepenFuser`).
        margin: members propose words where the main model's most probable token is ahead of the next by less,
            0 to 1; the paper (AdaFuse) uses 0.7. Of "spans".
        on_failure: what is done when an assistant is lost while a text is written: its server or its actor is
            gone. "stop": an error, which has what was written so far (`errors.MemberLost`). "continue": the
            others write on without it, and the result says from which token.
        boundary_aware: an assistant sits out a step where its last token is likely to be part of a longer
            token; one that counts more than the main model keeps a part of its weight (see `BoundaryRule`).
        cache: keep computed relative rows on disk, and use the rows of earlier runs.

    Raises:
        InputError: a value that is none of these.
    """

    # "preset": a preset file may have the setting, with a value such as this.
    weights: Sequence[float] | WeightsRule | None = field(default=None, metadata={"preset": [0.4, 0.6]})
    sharpness: float = field(default=SHARPNESS, metadata={"preset": 0.125})
    fuser: str | FuseFunction = field(default="auto", metadata={"preset": "deepen"})
    recipe: Recipe = field(default=DEFAULT_RECIPE, metadata={"preset": "calibrated"})
    learning_rate: float = field(default=DEFAULT_LEARNING_RATE, metadata={"preset": 0.25})
    relative_temperature: float | None = field(default=None, metadata={"preset": 40.0})
    weighing: str = field(default="confidence", metadata={"preset": "gate"})
    confidence: float = field(default=0.0, metadata={"preset": 0.5})
    gate: Sequence[float] | None = field(default=None, metadata={"preset": [-0.5, 0.0, 0.0, 0.5]})
    steps: int = 5
    candidates: int = 128
    entries: int = DEFAULT_ENTRIES
    min_probability: float = 1e-4
    margin: float = 0.7
    on_failure: OnFailure = field(default="stop", metadata={"preset": "continue"})
    boundary_aware: bool = True
    cache: bool = True

    def __post_init__(self) -> None:
        check_recipe(self.recipe)
        check_on_failure(self.on_failure)
        kept: dict[str, Any] = {
            "learning_rate": check_learning_rate(self.learning_rate),
            "steps": check_steps(self.steps),
            "min_probability": check_min_probability(self.min_probability),
            "margin": real_number("margin", self.margin, "0 to 1", lambda x: 0 <= x <= 1),
            "sharpness": real_number("sharpness", self.sharpness, "0 to 10", lambda x: 0 <= x <= 10),
            "confidence": real_number("confidence", self.confidence, "0 to 10", lambda x: 0 <= x <= 10),
            "candidates": whole_number("candidates", self.candidates, 1),
            "entries": whole_number("entries", self.entries, 1),
            "boundary_aware": true_or_false("boundary_aware", self.boundary_aware),
            "cache": true_or_false("cache", self.cache),
        }
        kept["gate"] = check_weighing(self.weighing, kept["confidence"], self.gate)
        if isinstance(self.weights, str):
            check_weights_rule(self.weights)
        elif self.weights is not None:
            kept["weights"] = tuple(read_weights(self.weights))
        if self.relative_temperature is not None:
            name = "relative_temperature"
            kept[name] = check_temperature(name, self.relative_temperature)
        # Numbers of our own: the caller's list may change later, and a variant reads these settings again.
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def changed(self, **given: Any) -> FusionSettings:
        """The same settings but for these.

        Raises:
            InputError: a name that is no setting, or a value out of range.
        """
        names = [one.name for one in fields(self)]
        if unknown := [name for name in given if name not in names]:
            near = get_close_matches(unknown[0], names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise InputError(f"{', '.join(unknown)}: no setting of an ensemble; {advice}")
        return replace(self, **given)

    def resolved(self, logits: bool) -> FusionSettings:
        """The same with "auto" made a fuser, and "follow" given weights that differ by text.

        Without weights, and where all members give logits: "follow", with weights from the members' sizes and
        the prompt. So a text follows the larger member, unless another one reads its prompt far better. Where
        weights are given, or a member has its most probable tokens alone: "deepen".

        Args:
            logits: whether all members give full logits.
        """
        if self.fuser == "follow" and self.weights is None:  # equal ones would make it "deepen" everywhere
            return replace(self, weights="size")
        if self.fuser != "auto":
            return self
        if logits and (self.weights is None or isinstance(self.weights, str)):
            return replace(self, fuser="follow", weights=self.weights or "size")
        return replace(self, fuser="deepen")

    @property
    def weights_rule(self) -> WeightsRule | None:
        """By which weights are found for each prompt; None where they are given."""
        return self.weights if isinstance(self.weights, str) else None

    def member_weights(self, members: int) -> list[float]:
        """lambda_i for so many members; equal ones where a rule finds them for each prompt.

        Raises:
            InputError: see `check_weights`.
        """
        if self.weights is None or isinstance(self.weights, str):
            return [1 / members] * members
        return check_weights(self.weights, members)


def check_learning_rate(value: Any) -> float:
    """The value as a float; InputError where it is out of range."""
    return real_number(
        "learning_rate", value, "above 0 to 10 (the paper uses 0.1 to 0.5)", lambda x: 0 < x <= 10
    )


def check_steps(value: Any) -> int:
    """The value as an int; InputError where it is out of range."""
    return whole_number("steps", value, 1, 64)


def check_min_probability(value: Any) -> float:
    """The value as a float; InputError where it is out of range."""
    # As the core takes it: a double just below 1 is a float of 1.
    as_float = partial(torch.tensor, dtype=torch.float32, device="cpu")
    return real_number("min_probability", value, "0 to below 1", lambda x: 0 <= as_float(x).item() < 1)


def check_on_failure(value: Any) -> None:
    """Raise InputError for what is no `OnFailure`."""
    if not isinstance(value, str) or value not in get_args(OnFailure):
        raise InputError(f"on_failure is {value!r}; use 'stop' or 'continue'")
