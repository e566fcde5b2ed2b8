"""Paths as users name them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path


def user_path(name: str | PathLike[str]) -> Path:
    """The path with `~` written out; as in a shell, the `~` of nobody's home stays as it is."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # of `~nobody`, and of `~` where no home is known
        return path
