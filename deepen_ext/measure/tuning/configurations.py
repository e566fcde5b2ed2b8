"""What `tune` may choose, in which order it looks, and how it decides. Nothing here knows a model.

A configuration is a point; a coordinate search moves it along one setting at a time, those first that are
expected to gain most (measured: weights far more than recipe, learning rate and temperature).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

from deepen_ext.measure.likelihood.token_likelihoods import ratio
from deepen_ext.space.recipes import DEFAULT_LEARNING_RATE, DEFAULT_TEMPERATURES, RECIPES, Recipe

LEARNING_RATES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6)
# The paper's recipe keeps its own: where its rows are all but even, another one only flattens the main
# model's distribution, which pays in the likelihood of an overconfident model and in nothing else.
TEMPERATURES: Mapping[str, tuple[float, ...]] = {"calibrated": (10.0, 20.0, 40.0, 80.0)}
CONFIDENCES = (0.0, 0.25, 0.5, 1.0)
WEIGHT_STEPS = (0.2, 0.1)  # of the grid, the coarse one first
_LEAST_WEIGHT = 0.05  # a member that counts less is better left out
_DIGITS = 12  # of a weight on the grid: 0.1 + 0.2 is 0.3, and not a second configuration beside it
# How far from the best, in standard errors of the paired difference, a simpler configuration may be.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Configuration:
    """One way to set an ensemble up.

    Attributes:
        main: the main model's index among the members as named.
        weights: of the members as named, summing to 1.
        recipe, learning_rate, temperature: of a fuser that uses recipes, else None; the bytes recipe has no
            temperature either.
        confidence: of any fuser.
        source: where the weights come from, for readers: uniform, accuracy, likelihood or grid.
    """

    main: int
    weights: tuple[float, ...]
    recipe: Recipe | None = None
    learning_rate: float | None = None
    temperature: float | None = None
    confidence: float = 0.0
    source: str = field(default="uniform", compare=False)

    def order(self) -> list[int]:
        """Member indices, the main model's first and the others as named."""
        return [self.main, *(i for i in range(len(self.weights)) if i != self.main)]

    def ordered_weights(self) -> list[float]:
        """The weights in that order."""
        return [self.weights[i] for i in self.order()]


@dataclass(frozen=True)
class Space:
    """Which configurations there are.

    Attributes:
        members: how many.
        recipes: those that may be chosen, the default first; () for a fuser that uses none, of which only
            weights, confidence and main model can be chosen.
    """

    members: int
    recipes: tuple[Recipe, ...] = RECIPES

    def default(self, main: int) -> Configuration:
        """Uniform weights and the defaults."""
        even = Configuration(main, (1 / self.members,) * self.members)
        if not self.recipes:
            return even
        return _with_recipe(replace(even, learning_rate=DEFAULT_LEARNING_RATE), self.recipes[0])

    def distance(self, one: Configuration) -> tuple[int, float]:
        """How far from the defaults: how many settings differ, then by how much. The main model is none."""
        default = self.default(one.main)
        steps = [sum(abs(a - b) for a, b in zip(one.weights, default.weights, strict=True))]
        if one.learning_rate and default.learning_rate:
            steps.append(abs(math.log(one.learning_rate / default.learning_rate)))
        if one.temperature and one.recipe:
            steps.append(abs(math.log(one.temperature / DEFAULT_TEMPERATURES[one.recipe])))
        steps.append(float(one.recipe != default.recipe))
        steps.append(one.confidence)
        return sum(step > 1e-9 for step in steps), sum(steps)


class OutOfTime(Exception):
    """The budget is spent; what was measured so far stands."""


# Total bits of the dev items under a configuration; raises OutOfTime.
Measure = Callable[[Configuration], float]


def search(
    start: Configuration, space: Space, informed: Mapping[str, tuple[float, ...]], measure: Measure
) -> Configuration:
    """The end of a coordinate search: no single step from it is better. Every configuration is measured once.

    Args:
        start: where to begin, measured already.
        space: what may be chosen.
        informed: weights that were found from the members' own results, by where they come from.
        measure: called for each configuration to be looked at; its answer is remembered.

    Raises:
        OutOfTime: as `measure` does.
    """
    known: dict[Configuration, float] = {}

    def bits(one: Configuration) -> float:
        if one not in known:
            known[one] = measure(one)
        return known[one]

    best, before = start, None
    while best != before:
        before = best
        for source, weights in informed.items():
            best = min(best, replace(best, weights=weights, source=source), key=bits)
        for step in WEIGHT_STEPS:
            for giver, taker in permutations(range(space.members), 2):
                best = _walk(best, _shifts(best, giver, taker, step), bits)
        for setting, values in (("learning_rate", LEARNING_RATES), ("confidence", CONFIDENCES)):
            best = _along(best, setting, values, bits)
        for main in range(space.members):
            best = min(best, replace(best, main=main), key=bits)
        for recipe in space.recipes:
            if recipe != best.recipe:
                best = min(best, _with_recipe(best, recipe), key=bits)
        best = _along(best, "temperature", TEMPERATURES.get(best.recipe or "", ()), bits)
    return best


def _walk(best: Configuration, line: Iterable[Configuration], bits: Measure) -> Configuration:
    """The last point of a line before it gets worse."""
    for one in line:
        if bits(one) >= bits(best):
            break
        best = one
    return best


def _shifts(start: Configuration, giver: int, taker: int, step: float) -> Iterator[Configuration]:
    """Weight handed from one member to another, step by step."""
    weights = list(start.weights)
    while weights[giver] - step >= _LEAST_WEIGHT - 1e-9:
        weights[giver] = round(weights[giver] - step, _DIGITS)
        weights[taker] = round(weights[taker] + step, _DIGITS)
        yield replace(start, weights=tuple(weights), source="grid")


def _along(best: Configuration, setting: str, values: Sequence[float], bits: Measure) -> Configuration:
    """Through the setting's larger values while it gets better, then through its smaller ones.

    A setting that the configuration does not have stays that way.
    """
    here = getattr(best, setting)
    if here is None:
        return best
    for line in ([one for one in values if one > here], [one for one in reversed(values) if one < here]):
        changes: list[dict[str, Any]] = [{setting: value} for value in line]
        best = _walk(best, [replace(best, **change) for change in changes], bits)
    return best


def _with_recipe(one: Configuration, recipe: Recipe) -> Configuration:
    return replace(one, recipe=recipe, temperature=DEFAULT_TEMPERATURES.get(recipe))


def proportional(scores: Sequence[float]) -> tuple[float, ...] | None:
    """Weights proportional to scores that are not negative (DeePEn-Adapt); None where all are 0."""
    total = sum(scores)
    return rounded([score / total for score in scores]) if total > 0 else None


def from_likelihood(bits: Sequence[Sequence[float]], sharpness: float) -> tuple[float, ...] | None:
    """Weights by the rule for prompts, of a mean item; None where every member finds some item impossible.

        w_i = exp(-sharpness N_i) / sum,    N_i the member's mean nats of an item

    That is the geometric mean of the weights that the rule gives for each item by itself, from equal ones.
    The nats of all items together would be a prompt that nobody reads: of 200 short answers all weight would
    go to the member that is a little better.

    Args:
        bits: of each member, those of each item.
        sharpness: for each nat.
    """
    nats = [math.log(2) * sum(own) / len(own) for own in bits]
    best = min(nats)
    if math.isinf(best):
        return None
    raised = [math.exp(-sharpness * (one - best)) for one in nats]
    return rounded([one / sum(raised) for one in raised])


def rounded(weights: Sequence[float]) -> tuple[float, ...]:
    """Three decimals, as a preset can show them; still summing to 1."""
    short = [round(weight, 3) for weight in weights]
    short[short.index(max(short))] += 1 - sum(short)
    return tuple(round(weight, 3) for weight in short)


def paired_difference(
    one: Sequence[float], other: Sequence[float], sizes: Sequence[int]
) -> tuple[float, float]:
    """Bits a byte by which `one` is above `other` on the same items, and the standard error.

    Bits a byte of a set are all its bits over all its bytes (see `ratio`). One item has an infinite error.

    Args:
        one, other: bits of each item.
        sizes: bytes of each item.
    """
    found = ratio([a - b for a, b in zip(one, other, strict=True)], sizes)
    return found.value, math.inf if found.error is None else found.error


def choose(
    tried: Mapping[Configuration, Sequence[float]], space: Space, sizes: Sequence[int]
) -> Configuration:
    """The configuration to recommend.

    A configuration that is best on some items is in part lucky on them. So of all those whose paired
    difference to the best is within `TOLERANCE` standard errors, this is the one nearest to the defaults (of
    equally near ones the one with fewest bits); but never one that is worse on the items than uniform weights
    with the defaults, whichever model is main. Which one is main is no matter of being simple.

    Args:
        tried: bits of each item by configuration; the uniform one of every main model is among them.
        space: whose defaults count.
        sizes: bytes of each item.
    """
    bits = {one: sum(own) for one, own in tried.items()}
    ceiling = min(bits[space.default(main)] for main in range(space.members))
    best = min(bits, key=lambda one: bits[one])

    def near(one: Configuration) -> bool:
        mean, error = paired_difference(tried[one], tried[best], sizes)
        return bits[one] <= ceiling and mean <= TOLERANCE * error

    return min(filter(near, tried), key=lambda one: (space.distance(one), bits[one]))
