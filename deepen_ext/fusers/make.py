"""Fusers by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from deepen_ext.errors import InputError
from deepen_ext.fusers.average import AverageFuser
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.deepen import DeepenFuser
from deepen_ext.fusers.others import FunctionFuser, FuseFunction, SingleFuser
from deepen_ext.fusers.union_topk import UnionTopkFuser
from deepen_ext.fusers.union_vocab import UnionVocabFuser
from deepen_ext.members.member import Member
from deepen_ext.space.member_maps import MemberMaps

FUSERS = ("deepen", "average", "union-topk", "union-vocab", "single")


def on_relative_maps(fuser: str | FuseFunction) -> bool:
    """Whether the fuser works in relative space."""
    return fuser in ("deepen", "average")


def method_name(fuser: str | FuseFunction, recipe: str) -> str:
    """What tables and records call it: "deepen:bytes", "average", or the function's name."""
    if not isinstance(fuser, str):
        return str(getattr(fuser, "__qualname__", type(fuser).__name__))
    return f"deepen:{recipe}" if fuser == "deepen" else fuser


def parse_fuser(spec: str, recipe: str) -> tuple[str | FuseFunction, str]:
    """What the command line names: ("deepen", recipe), another fuser's name, or a function.

    Args:
        spec: one of `FUSERS`, "deepen:RECIPE", or "module:function" (a module of the current folder, too).
        recipe: of "deepen" without one.

    Raises:
        InputError: no such fuser, module or function.
    """
    name, _, rest = spec.partition(":")
    if spec in FUSERS:
        return spec, recipe
    if name == "deepen":
        return "deepen", rest
    if not rest:
        raise InputError(f"fuser '{spec}': use one of {', '.join(FUSERS)}, deepen:RECIPE or module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(name), rest)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: '.:f', ':f'
        raise InputError(f"fuser '{spec}': {error}; name a function as module:function") from error
    if not callable(found):
        raise InputError(f"fuser '{spec}' is {found!r}; name a function")
    return found, recipe


def make_fuser(
    fuser: str | FuseFunction,
    members: Sequence[Member],
    maps: MemberMaps | None,
    names: Sequence[str],
    *,
    recipe: str,
    learning_rate: float,
    steps: int,
    candidates: int,
    confidence: float,
    min_probability: float,
) -> Fuser:
    """A fuser for these members, with their maps where it works in relative space.

    Raises:
        InputError: a setting out of range.
    """
    common: dict[str, Any] = {"candidates": candidates, "confidence": confidence, "names": names}
    vocab_sizes, device = [member.vocab_size for member in members], members[0].device
    if maps is not None and fuser == "deepen":
        return DeepenFuser(
            maps.maps,
            learning_rate=learning_rate,
            steps=steps,
            min_probability=min_probability,
            log_probs=recipe != "paper",
            **common,
        )
    if maps is not None and fuser == "average":
        return AverageFuser(maps.maps, maps.anchors.token_ids[0], min_probability=min_probability, **common)
    if fuser == "single":
        return SingleFuser(vocab_sizes, device, **common)
    if not isinstance(fuser, str):
        return FunctionFuser(fuser, vocab_sizes, device, **common)
    bridge = TokenBridge([member.vocabulary for member in members], [member.eos_ids for member in members])
    if fuser == "union-topk":
        return UnionTopkFuser(vocab_sizes, bridge, device, **common)
    return UnionVocabFuser(vocab_sizes, bridge, device, **common)
