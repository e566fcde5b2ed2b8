"""Loading the members of an ensemble, each in the backend that its options ask for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepen_ext.errors import InputError
from deepen_ext.ground.progress import Progress
from deepen_ext.members.llama_cpp.library import INSTALL, is_installed
from deepen_ext.members.load_options import (
    ONLY_HTTP,
    ONLY_TRANSFORMERS,
    LoadOptions,
    on_this_machine,
    options_of_each,
)
from deepen_ext.members.member import Member
from deepen_ext.members.registry import backend_module
from deepen_ext.members.source import Source, find_adapter, find_source, split_adapter

__all__ = ["Progress", "load_member", "load_members"]

_HF, _LLAMA_CPP, _HTTP = "transformers", "llama.cpp", "http"


def load_member(name_or_path: str | Path, *, progress: Progress | None = None, **options: Any) -> Member:
    """Load a model and its tokenizer, ready for inference.

    Args:
        name_or_path: hub name, local folder, ``.gguf`` file, or an embedded model (``demo:gemma-3-270m``);
            with a PEFT adapter on it, ``"base@adapter"``. Or the address of a server, ``http://host:port``.
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
    check_names(members)
    found = [split_adapter(one) for one in members]
    each = options_of_each(members, **options)
    plans = [
        _plan(name, base, adapter, own)
        for name, (base, adapter), own in zip(members, found, each, strict=True)
    ]
    in_actors = {number: one for number, one in enumerate(plans) if one.options.placement is not None}
    here = {number: one for number, one in enumerate(plans) if number not in in_actors}
    for one in in_actors.values():
        _check_placed(one)
    if in_actors or any(one.source.url is not None for one in plans):
        here = {number: _without_timeout(one) for number, one in here.items()}
    backends = dict(zip(here, _backends(list(here.values()), progress), strict=True))
    _set_torch_threads([one for number, one in here.items() if backends[number] == _HF])
    placed: dict[int, Any] = {}
    try:
        for number, one in in_actors.items():
            placed[number] = _start_elsewhere(one, progress)
        return [
            placed[number].member(progress)
            if number in placed
            else backend_module(backends[number]).load(here[number].source, here[number].options, progress)
            for number in range(len(plans))
        ]
    except BaseException:
        for started in placed.values():
            started.end()
        raise


def check_names(members: Sequence[str | Path]) -> Sequence[str | Path]:
    """The members' names, if they are a list of names. A set has no first member, which the main model is.

    Raises:
        InputError: one name alone, no list, or something in it that is no name.
    """
    if isinstance(members, str | os.PathLike):
        raise InputError(f"members is {str(members)!r} alone; give a list of names, the main model first")
    if not isinstance(members, Sequence):
        raise InputError(
            f"members is of type {type(members).__name__}; give a list of names, the main model first"
        )
    for number, one in enumerate(members):
        if not isinstance(one, str | os.PathLike) or not str(one).strip():
            raise InputError(
                f"member {number} is {one!r}; give a hub name, a folder, a .gguf file, demo:NAME or "
                "http://host:port"
            )
    return members


def _without_timeout(one: _Plan) -> _Plan:
    """A member of this process beside others elsewhere: a time limit given for all holds for those."""
    return one if one.source.url is not None else replace(one, options=replace(one.options, timeout=None))


def _start_elsewhere(one: _Plan, progress: Progress | None) -> Any:
    """Begin to load a member in an actor; all of them load while those of this process do."""
    from deepen_ext.members.ray.load import start_loading

    return start_loading(load_member, one.name, one.source, one.options, progress)


@dataclass(frozen=True)
class _Plan:
    """A member that is about to be loaded; its name as the caller gave it."""

    name: str
    source: Source
    options: LoadOptions


def _plan(name: str | Path, base: str | Path, adapter: str | None, options: LoadOptions) -> _Plan:
    """What is loaded. The adapter is a folder that exists, or a hub name."""
    source = find_source(base)
    if adapter is not None and options.adapter is not None:
        raise InputError(
            f"{name}: the name has the adapter {adapter}, and adapter={str(options.adapter)!r} is given too; "
            "give one of them"
        )
    given = options.adapter if adapter is None else adapter
    try:
        if options.placement is None:
            options = on_this_machine(options)
        return _Plan(
            str(name), source, replace(options, adapter=None if given is None else find_adapter(given))
        )
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _backends(plans: Sequence[_Plan], progress: Progress | None) -> list[str]:
    """The name of the backend that each member runs in."""
    found, missed = [], []
    for one in plans:
        backend = _backend_of_server(one) if one.source.url is not None else one.options.backend
        if backend is None and _is_for_llama_cpp(one):
            if is_installed():
                backend = _LLAMA_CPP
                _refuse_to_choose(one)
            else:
                missed.append(one.name)
        backend = backend or _HF
        if backend == _LLAMA_CPP and not one.source.is_gguf:
            raise InputError(
                f"{one.name}: llama.cpp reads .gguf files, and this is none; leave backend='llama.cpp' "
                "(--backend) out for this member, or name a .gguf file"
            )
        if backend == _HTTP:
            _check_server_options(one)
        else:
            _refuse_server_options(one)
        if backend not in (_HF, _HTTP):
            one.options.refuse_others(backend, member=one.name)
        found.append(backend)
    if missed and progress is not None:
        progress(
            f"Note: llama.cpp is not installed. transformers runs {' and '.join(missed)} instead, converted "
            f"and slower. To install it: {INSTALL}"
        )
    return found


def _backend_of_server(one: _Plan) -> str:
    if one.options.backend not in (None, _HTTP):
        raise InputError(
            f"{one.name}: the model is in a server, not in {one.options.backend}; leave backend (--backend) "
            "out for this member"
        )
    return _HTTP


def _check_server_options(one: _Plan) -> None:
    """Refuse what does not go with a server."""
    if one.source.url is None:
        raise InputError(f"{one.name}: the backend http is for servers; name one as http://host:port")
    if one.options.threads is not None:
        raise InputError(
            f"{one.name}: threads={one.options.threads}: the server chooses its threads; leave threads out "
            "for this member"
        )
    one.options.refuse_others(_HTTP, *ONLY_HTTP, member=one.name)


def _check_placed(one: _Plan) -> None:
    """Refuse what does not go with an actor."""
    if one.source.url is not None:
        raise InputError(f"{one.name}: a server runs this member; leave placement out for it")
    _refuse_server_options(one, "timeout")


def _refuse_server_options(one: _Plan, *known: str) -> None:
    if name := next((name for name in one.options.given() if name in set(ONLY_HTTP) - set(known)), None):
        kind = "run elsewhere (http://host:port, or placement)" if name == "timeout" else "a server runs"
        raise InputError(
            f"{one.name}: {name} is for members that {kind}; where only some are of that kind, give {name} "
            "for each member, with None (on the command line -) for this one"
        )


def _is_for_llama_cpp(one: _Plan) -> bool:
    """Whether a member runs in llama.cpp by default, where that is installed."""
    return one.source.is_gguf and torch.device(one.options.device).type == "cpu"


def _refuse_to_choose(one: _Plan) -> None:
    """Refuse an option that takes a GGUF file away from the backend that it runs in by default."""
    if name := next((name for name in one.options.given() if name in ONLY_TRANSFORMERS), None):
        raise InputError(
            f"{one.name}: a .gguf file runs in llama.cpp, which has no {name}; give backend='transformers' "
            f"(--backend transformers), or leave {name} out"
        )


def _set_torch_threads(plans: Sequence[_Plan]) -> None:
    """Set the threads of the members that transformers computes: they share torch's."""
    wanted = {one.options.threads: one.name for one in plans if one.options.threads is not None}
    if len(wanted) > 1:
        several = ", ".join(f"{count} for {name}" for count, name in wanted.items())
        raise InputError(f"threads: {several}; members in transformers share torch's, so give one number")
    for count in wanted:
        torch.set_num_threads(count)
