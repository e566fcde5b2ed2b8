"""Defaults that the package and its command line share. How they were chosen: docs/results.md."""

from __future__ import annotations

from typing import Final, Literal, get_args

Recipe = Literal["bytes", "calibrated", "paper"]  # how tokens are placed in the relative space
RECIPES: Final[tuple[Recipe, ...]] = get_args(Recipe)
RECIPE: Final = "bytes"
LEARNING_RATE: Final = 0.15
