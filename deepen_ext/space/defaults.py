"""Defaults that the package and its command line share. How they were chosen: docs/results.md."""

from __future__ import annotations

from typing import Final

RECIPE: Final = "bytes"
LEARNING_RATE: Final = 0.15
