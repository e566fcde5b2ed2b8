"""In the place of the backends where a test looks at what they are asked for: nothing is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from deepen_ext.members import loading
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.registry import BACKENDS
from deepen_ext.members.source import Source


class Asked(BaseException):  # no command turns it into an exit code
    """All members were asked for."""


@contextmanager
def recorded(members: int = 1, *, llama_cpp: bool = False) -> Iterator[list[tuple[str, Source, LoadOptions]]]:
    """Backend, source and options of each member that is loaded meanwhile; the last one raises `Asked`.

    Args:
        members: how many will be loaded.
        llama_cpp: whether llama.cpp is installed.
    """
    found: list[tuple[str, Source, LoadOptions]] = []

    def module(backend: str) -> ModuleType:
        def load(source: Source, options: LoadOptions, progress: Any) -> object:
            found.append((backend, source, options))
            if len(found) == members:
                raise Asked
            return object()

        made = ModuleType(f"stand_in_of_{backend.replace('.', '_')}")
        made.load = load  # type: ignore[attr-defined]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "is_installed", lambda: llama_cpp)
        for backend in list(BACKENDS):
            made = module(backend)
            patch.setitem(sys.modules, made.__name__, made)
            patch.setitem(BACKENDS, backend, made.__name__)
        yield found
