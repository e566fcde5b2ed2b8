"""Paths as users name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from deepen_ext.errors import InputError


def user_path(name: str | PathLike[str]) -> Path:
    """The path with `~` written out; as in a shell, the `~` of nobody's home stays as it is."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:  # of `~nobody`, and of `~` where no home is known
        return path


def check_apart(
    written: Mapping[str, Path | None], read: Mapping[str, str | Path | None], models: Sequence[str]
) -> None:
    """That no file of a command is written over another one of it.

    Args:
        written: files by their options; None where one was not given.
        read: the same of what the command reads.
        models: what --model names, files among it.

    Raises:
        InputError: two names of one file, of which at least one is written.
    """
    places = {user_path(name).resolve(): "--model" for name in models}
    places |= {user_path(file).resolve(): option for option, file in read.items() if file is not None}
    for option, file in written.items():
        if file is None:
            continue
        place = user_path(file).resolve()
        if place in places:
            raise InputError(f"{option} {file} is the file of {places[place]} too; choose another name")
        places[place] = option
