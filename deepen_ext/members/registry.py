"""The backends by name, each imported when a member asks for it and not before; and the kinds of servers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from deepen_ext.errors import InputError

# Modules with a function `load(source, options, progress) -> Member`.
BACKENDS = {
    "transformers": "deepen_ext.members.hf.load",
    "llama.cpp": "deepen_ext.members.llama_cpp.load",
    "http": "deepen_ext.members.http.load",
}

# Kinds of servers, by the names of the classes in `deepen_ext.members.http.protocols`, which needs httpcore.
PROTOCOLS = ("llama.cpp", "openai", "sglang")


def backend_module(name: str) -> Any:
    """The module that loads a backend's members.

    Raises:
        InputError: there is no such backend.
    """
    if name not in BACKENDS:
        raise InputError(f"there is no backend {name!r}; there are {', '.join(BACKENDS)}")
    return import_module(BACKENDS[name])
