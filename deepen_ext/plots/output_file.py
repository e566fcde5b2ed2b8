"""Whether a picture can be written, looked at before the hours of work that end in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from deepen_ext.errors import InputError
from deepen_ext.ground.cache_folder import atomic_write, is_no_file
from deepen_ext.ground.paths import user_path

FORMATS = (".svg", ".png", ".pdf")
INSTALL = "pip install 'deepen-ext[plot]'"


def check_output_file(option: str, file: Path | None, formats: Sequence[str] = FORMATS) -> None:
    """Nothing is imported and nothing written. None, an option that was not given, is always right.

    Args:
        option: its name, for messages.
        file: where the picture is to go.
        formats: endings of file names that can be written.

    Raises:
        InputError: another ending, what `check_place` refuses, matplotlib is not installed.
    """
    if file is None:
        return
    if file.suffix.lower() not in formats:
        raise InputError(f"{option} {file}: a name that ends in {' or '.join(formats)} is needed")
    check_place(option, user_path(file))
    if find_spec("matplotlib") is None:
        raise InputError(f"{option} needs matplotlib, which is not installed: {INSTALL}")


def check_place(option: str, file: Path) -> None:
    """Whether a file can be made there, or written into in its place.

    Raises:
        InputError: a folder, a pipe or a device; in a folder that is not there, or no right to write there; a
            name that the system does not take.
    """
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # to be made; its folder is looked at below
    except OSError as error:  # a name that is too long, links in a circle, no right to look there
        raise InputError(f"{option} {file}: {error.strerror}; name another file") from error
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder; name a file in it")
    if is_no_file(file):
        raise InputError(f"{option} {file} is a pipe or a device, which would be replaced; name a file")
    if not file.parent.is_dir():
        raise InputError(f"{option} {file}: there is no folder {file.parent}; make it first")
    if not os.access(file.parent, os.W_OK):
        raise InputError(f"{option} {file}: no right to write there; name another file")


def write_file(file: Path, content: str | bytes) -> None:
    """Write it in the place of what is there, whole or not at all.

    Raises:
        InputError: the system does not take it.
    """
    try:
        with atomic_write(user_path(file)) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); name another file") from error
