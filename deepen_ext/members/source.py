"""What a member's name stands for: an embedded model, a GGUF file, a folder, a model of the hub, or a server.

A PEFT adapter may stand behind the model: ``"base@adapter"``.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from pathlib import Path

from deepen_ext.errors import InputError
from deepen_ext.ground.paths import user_path
from deepen_ext.members import embedded

# What is there os.path is asked: it says no to a name too long for a path, where Path has an OSError.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Source:
    """Where a member's weights are. Just one of the four is there.

    Attributes:
        embedded: a key of `embedded.MODELS`: a GGUF file that is fetched on first use.
        path: a folder of transformers, or a GGUF file.
        hub: a hub name such as org/name.
        url: a server's address, ``http://host:port``.
    """

    embedded: str | None = None
    path: Path | None = None
    hub: str | None = None
    url: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file."""
        return self.embedded is not None or (self.path is not None and self.path.is_file())


def is_url(name: str) -> bool:
    """Whether a member's name is a server's address."""
    return name.lower().startswith(("http://", "https://"))


def split_adapter(name_or_path: str | Path, folder: Path | None = None) -> tuple[str | Path, str | None]:
    """A member's name without its adapter, and the adapter: ``"base@adapter"`` gives both parts.

    Paths may hold an @ themselves. So what exists as a whole has no adapter. Otherwise the name is cut at the
    first @ whose left part is a file, a folder or an embedded model; or, where no @ has that, at the first
    one with a hub name on its left.

    Args:
        name_or_path: as the user gave it.
        folder: where relative paths start; None for the current folder.
    """

    def exists(path: str | Path) -> bool:
        return os.path.exists((folder or Path()) / user_path(path))

    name = str(name_or_path)
    if "@" not in name or is_url(name) or exists(name):
        return name_or_path, None
    splits = [(name[: one.start()], name[one.end() :]) for one in re.finditer("@", name)]
    splits = [(base, adapter) for base, adapter in splits if base and adapter]
    for base, adapter in splits:
        if base.startswith("demo:") or exists(base):
            return base, adapter
    for base, adapter in splits:
        if _HUB_NAME.fullmatch(base):
            return base, adapter
    return name_or_path, None


def absolute_name(name_or_path: str | Path) -> str:
    """The name with absolute paths in it, for a process with another working folder."""

    def absolute(part: str | Path) -> str:
        path = user_path(part)
        return str(path.absolute()) if os.path.exists(path) else str(part)

    base, adapter = split_adapter(name_or_path)
    return absolute(base) if adapter is None else f"{absolute(base)}@{absolute(adapter)}"


def find_adapter(name_or_path: str | Path) -> Path | str:
    """The folder of a PEFT adapter, or its hub name. Nothing is fetched or read.

    Raises:
        InputError: the folder holds no adapter, or there is no such folder and the text cannot be a hub name.
    """
    path = user_path(name_or_path)
    if os.path.isdir(path):
        if not (path / "adapter_config.json").is_file():
            raise InputError(f"{path}: the folder has no adapter_config.json; name the folder of an adapter")
        return path
    name = str(name_or_path)
    if os.path.exists(path) or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"{name}: no folder of an adapter, and not a hub name (org/name); check the spelling of the path"
        )
    return name


def find_source(name_or_path: str | Path) -> Source:
    """What a name stands for. Nothing is fetched or read.

    Raises:
        InputError: there is no such file, folder or embedded model, it holds no model, or the text cannot be
            a hub name.
    """
    if str(name_or_path).startswith("demo:"):
        name = str(name_or_path).removeprefix("demo:")
        embedded.find(name)
        return Source(embedded=name)
    if is_url(str(name_or_path)):
        return Source(url=str(name_or_path))
    path = user_path(name_or_path)
    if os.path.isdir(path):
        if (path / "adapter_config.json").is_file():  # it may have neither of these
            return Source(path=path)
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path}: the folder has no config.json; name the folder of a transformers model"
            )
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            raise InputError(
                f"{path}: the folder has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it "
                "there with tokenizer.save_pretrained"
            )
        return Source(path=path)
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{path}: not a model; name a folder, a .gguf file or a hub name such as org/name"
            )
        return Source(path=path)
    name = str(name_or_path)
    if path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"{name}: no such file or folder, and not a hub name (org/name); check the spelling of the path"
        )
    return Source(hub=name)
