"""llama.cpp's shared library: which packages bring it, which is used, and what it says when it fails."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepen_ext.errors import ModelError
from deepen_ext.members.llama_cpp import api

INSTALL = "pip install 'deepen-ext[llama-cpp]'"
VARIABLE = "DEEPEN_LLAMA_CPP"  # names a library file, and comes before the packages

# Package as pip names it, as Python imports it, and where its library lies. Somebody who has llama-cpp-python
# built it for the machine or its GPU, so it comes first.
_PACKAGES = (
    ("llama-cpp-python", "llama_cpp", ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll")),
    ("xllamacpp", "xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")),
)

# A file that it cannot load is two messages: the reason, and last of all that there was one.
_REASON, _NO_REASON = "error loading model: ", ": failed to load model"


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded library whose structures are known.

    Attributes:
        call: the functions of `api`, as ctypes has them.
        file: where it was found.
        name: for readers, such as "llama.cpp 0.6.0 (xllamacpp 2026.10.11549)".
    """

    call: Any
    file: Path
    name: str
    _log: Any = field(repr=False)
    _said: deque[str] = field(repr=False)

    def complaint(self) -> str:
        """The last thing it warned of or failed at since this was asked last; "" where it said nothing."""
        said = list(self._said)  # at once: another thread's library may be saying more
        self._said.clear()
        found = [one.strip().rstrip(".") for one in said]
        reasons = [one.rpartition(_REASON)[2] for one in found if not one.endswith(_NO_REASON)]
        return reasons[-1] if reasons else ""


def is_installed() -> bool:
    """Whether some package or `DEEPEN_LLAMA_CPP` brings the library. Nothing is loaded or imported."""
    return bool(os.environ.get(VARIABLE)) or any(True for _ in _found())


def load_library() -> Library:
    """The library, loaded once in a process.

    `DEEPEN_LLAMA_CPP` names its file; without it llama-cpp-python's is taken, or xllamacpp's.

    Raises:
        ModelError: there is none, or none whose version is supported; the message names each that was found
            and the command that installs one.
    """
    with _loading:
        return _load(os.environ.get(VARIABLE) or "")


_loading = threading.Lock()


@cache
def _load(named: str) -> Library:
    found = [(Path(named), f"{VARIABLE}={named}")] if named else list(_found())
    if not found:
        raise ModelError(f"llama.cpp is not installed; install it with: {INSTALL}")
    refused = []
    for file, what in found:
        try:
            return _opened(file, what)
        except (OSError, AttributeError, _UnknownLayout) as error:
            refused.append(f"{what}: {error}")
    releases = " and ".join(layout.releases for layout in api.LAYOUTS)
    if named:
        raise ModelError(
            f"{refused[0]}; name the library file of a supported version ({releases}), or unset {VARIABLE} "
            f"for that of an installed package ({INSTALL})"
        )
    raise ModelError(
        f"llama.cpp is installed in a version that is not supported ({'; '.join(refused)}). Known are "
        f"{releases}; install one with: {INSTALL}"
    )


class _UnknownLayout(Exception):
    """The structures of this release are not known."""


def _opened(file: Path, what: str) -> Library:
    call = ctypes.CDLL(str(file))
    api.declare(call)
    for layout in api.LAYOUTS:
        api.declare_layout(call, layout)
        if api.fits(call):
            break
    else:
        raise _UnknownLayout("its structures are not those of a known release")
    said: deque[str] = deque(maxlen=20)
    log = _keeper(said)
    call.llama_log_set(log, None)
    call.llama_backend_init()
    return Library(call, file, f"llama.cpp {call.llama_version().decode()} ({what})", log, said)


def _keeper(said: deque[str]) -> Any:
    """Keeps warnings and errors, and drops everything else that the library says."""

    def keep(level: int, text: bytes, _: int | None) -> None:
        if level in (api.LOG_WARNING, api.LOG_ERROR) and text.strip(b" .\n"):
            said.append(text.decode(errors="replace"))

    return api.LogCallback(keep)


def _found() -> Iterator[tuple[Path, str]]:
    """Library files of installed packages, with the packages' names and versions."""
    for package, module, patterns in _PACKAGES:
        spec = find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for file in (file for pattern in patterns for file in sorted(Path(folder).glob(pattern))):
                yield file, f"{package} {metadata.version(package)}"
