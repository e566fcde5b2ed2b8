"""Members' names in a file: their paths start from the file's folder, whatever the current folder is."""

from __future__ import annotations

import os
from pathlib import Path

from deepen_ext.errors import InputError, shown
from deepen_ext.members.source import split_adapter


def name_from_file(name: str, file: Path) -> str:
    """A name that stands in a file, as `load_member` finds it from any folder; base and adapter alike.

    Raises:
        InputError: it cannot be a name or a path; a path that starts from the current folder instead.
    """
    try:
        if "\0" in name:
            raise ValueError("it has a zero byte")
        name.encode()  # half a surrogate pair has no bytes
        base, adapter = split_adapter(name, file.absolute().parent)
        found = _path_from_file(str(base), file)
        return found if adapter is None else f"{found}@{_path_from_file(adapter, file)}"
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, ~ of no user
        raise InputError(f"{shown(name)} is no model's name or path: {error}") from error


def name_for_file(name: str, file: Path) -> str:
    """A name as a file has it: paths of files and folders start from the file, unless they are absolute."""
    base, adapter = split_adapter(name)
    return "@".join(path_for_file(part, file) for part in (str(base), adapter) if part is not None)


def path_for_file(name: str, file: Path, *, new: bool = False) -> str:
    """A path as a file has it: see `name_for_file`; with `new` also a path that is not there yet."""
    path = Path(name).expanduser()
    if name.startswith("demo:") or path.is_absolute() or not (new or path.exists()):
        return name
    folder = file.absolute().parent
    relative = Path(os.path.relpath(path.absolute(), folder)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def _path_from_file(name: str, file: Path) -> str:
    if name.startswith("demo:"):
        return name
    path = Path(name).expanduser()
    beside = file.absolute().parent / path  # an absolute path stays as it is
    if path.is_absolute() or beside.exists() or name.startswith("."):
        return str(beside)
    if path.exists():
        raise InputError(
            f"{name} is in the current folder, but a preset's paths start from its own, "
            f"{beside.parent}; write {path.absolute()}"
        )
    return name  # of the hub
