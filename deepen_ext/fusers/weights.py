"""Weights as users give them, one for each member, and those that the members' sizes give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, get_args

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number

# Weights that are found for each prompt, by what they start from: the members' sizes, or equal weights.
WeightsRule = Literal["size", "prompt"]
WEIGHTS_RULES = get_args(WeightsRule)
# How many times the first member's size another one must have to be the main model in its place. Set by
# reasoning, not by a search: sizes that differ less say little about who is better.
_FAR_LARGER = 2


def read_weights(weights: Any) -> list[float]:
    """Numbers in an order, as floats: a list, a tuple, an array, or what gives them one by one.

    Raises:
        InputError: a set or a mapping, whose order says nothing, or something else without numbers.
    """
    if isinstance(weights, str | bytes | Set | Mapping) or not isinstance(weights, Iterable):
        raise InputError(f"weights is {shown(weights)}; give a list of numbers, one for each member")
    return [real_number("weight", weight, "0 to 1", lambda _: True) for weight in weights]


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    weights = read_weights(weights)
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights


def check_weights_rule(name: Any) -> None:
    """Raise InputError for what is no `WeightsRule`."""
    if name not in WEIGHTS_RULES:
        raise InputError(f"weights is {shown(name)}; give a list of numbers, size or prompt")


def weights_by_size(sizes: Sequence[int | None]) -> list[float]:
    """lambda_i proportional to how many weights each member has outside of its embeddings.

    What a model knows grows with that number (Kaplan et al., arXiv 2001.08361), and a short prompt tells less
    of it. That the weights are in proportion was chosen on dev data: docs/results.md. Of a mixture of experts
    all experts count.

    Args:
        sizes: of each member; None where it is not known: then all weights are equal.
    """
    known = [one for one in sizes if one]
    if len(known) < len(sizes):
        return [1 / len(sizes)] * len(sizes)
    return [one / sum(known) for one in known]


def main_by_size(sizes: Sequence[int | None]) -> int:
    """Which member is the main model where nobody says so: the largest, if it is far larger than the first.

    Args:
        sizes: as `weights_by_size` takes them; the first member's first.
    """
    known = [one or 0 for one in sizes]
    far_larger = all(known) and max(known) >= _FAR_LARGER * known[0]
    return known.index(max(known)) if far_larger else 0
