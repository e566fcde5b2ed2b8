"""The recipes that relative rows are made by, and what the package and its command line set by default.

How the defaults were chosen: docs/results.md. No torch is imported here: the command line reads this first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number

Recipe = Literal["bytes", "calibrated", "paper"]
SimilarityRecipe = Literal["calibrated", "paper"]  # rows by the similarity of embeddings

RECIPES: Final[tuple[Recipe, ...]] = ("bytes", "calibrated", "paper")  # the default first
DEFAULT_RECIPE: Final = "bytes"

# Of the softmax over cosines: the paper's own, and one at which an anchor of today's models keeps its mass.
DEFAULT_TEMPERATURES: Final[Mapping[str, float]] = {"calibrated": 40.0, "paper": 100.0}
DEFAULT_ENTRIES: Final = 32  # how many of a similarity row's largest entries are kept
DEFAULT_LEARNING_RATE: Final = 0.15  # of the inverse search


def check_recipe(recipe: Any) -> None:
    """Raise InputError unless the recipe is one of `RECIPES`."""
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InputError(f"recipe is {shown(recipe)}; use one of {', '.join(RECIPES)}")


def check_temperature(name: str, value: Any) -> float:
    """The temperature of similarity rows as a float; InputError where it is out of range."""
    return real_number(name, value, "above 0 to 1000", lambda x: 0 < x <= 1000)
