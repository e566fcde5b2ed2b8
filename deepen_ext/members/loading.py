"""Loading the members of an ensemble, each in the backend that its options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepen_ext.members.gguf.convert import Progress
from deepen_ext.members.load_options import LoadOptions, options_of_each
from deepen_ext.members.member import Member
from deepen_ext.members.registry import backend_module
from deepen_ext.members.source import Source, find_source

__all__ = ["Progress", "load_member", "load_members"]


def load_member(name_or_path: str | Path, *, progress: Progress | None = None, **options: Any) -> Member:
    """Load a model and its tokenizer, ready for inference.

    Args:
        name_or_path: hub name, local folder, ``.gguf`` file, or an embedded model (``demo:gemma-3-270m``).
        progress: called with one line of text as each stage starts.
        options: those of `LoadOptions`: backend, device, dtype, ...

    Raises:
        InputError: unknown path or hub name, an option that the backend does not have or out of range.
        ModelError: the model cannot be loaded, or its tokenizer fails the byte round trip.
    """
    return load_members([name_or_path], progress=progress, **options)[0]


def load_members(
    members: Sequence[str | Path], *, progress: Progress | None = None, **options: Any
) -> list[Member]:
    """Load several, as `load_member` does; each option is one value for all, or a list of one for each.

    Raises:
        InputError: see `load_member`; a list of another length than the members'; a CUDA device that this
            build has no kernels for.
        ModelError: see `load_member`.
    """
    each = options_of_each(members, **options)
    sources = [find_source(one) for one in members]
    return [
        backend_module(_backend(source, own)).load(source, own, progress)
        for source, own in zip(sources, each, strict=True)
    ]


def _backend(source: Source, options: LoadOptions) -> str:
    """The name of the backend that a member runs in."""
    return options.backend or "transformers"
