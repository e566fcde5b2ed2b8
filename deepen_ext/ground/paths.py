"""Paths as users name them."""

from __future__ import annotations

from collections.abc import Iterable
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
    written: Iterable[tuple[str, str | PathLike[str] | None]],
    read: Iterable[tuple[str, str | PathLike[str] | None]] = (),
) -> None:
    """That no file of a command is written over another one of it. Each with its option; None: not given.

    Raises:
        InputError: two names of one file, of which at least one is written.
    """
    places = {user_path(file).resolve(): option for option, file in read if file is not None}
    for option, file in written:
        if file is None:
            continue
        place = user_path(file).resolve()
        if place in places:
            raise InputError(f"{option} {file} is the file of {places[place]} too; choose another name")
        places[place] = option
