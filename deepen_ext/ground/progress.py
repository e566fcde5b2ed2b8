"""How long work tells what it does."""

from __future__ import annotations

from collections.abc import Callable

# Called with one line of text as each stage starts.
Progress = Callable[[str], None]
