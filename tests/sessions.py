"""Sessions as tests use them: the logits themselves, members with another model, tokens that are forced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import torch

from deepen_ext.members.backend import Capabilities, Session
from deepen_ext.members.hf import session as hf_session
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.loaded_model import LoadedModel
from deepen_ext.members.hf.session import HFSession
from deepen_ext.members.member import Member


def open_session(member: Member, lanes: int = 1, *, capacity: int = 0) -> HFSession:
    """A session of a member in transformers."""
    return HFSession(member.backend, lanes, capacity=capacity)


def sync(session: Session, targets: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """The logits [len(targets), V] after these ids."""
    return session.ask(targets, 1).wait().scores()


def read(session: Session, lane: int, ids: Sequence[int], start: int = 0) -> Iterator[torch.Tensor]:
    """The logits after ``ids[start]`` and after every later id, in blocks."""
    return (block.scores() for block in session.read(lane, ids, start, 1))


def changed(member: Member, **changes: Any) -> Member:
    """The member with something else about its model: ``model``, ``context_length``, ``name``, ..."""
    backend = replace(member.backend, **changes)
    return replace(member, name=backend.name, backend=backend)


def forcing(tokens: Iterable[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor that leaves these tokens no choice, one after the other."""
    left = iter(tokens)

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -float("inf"))
        forced[:, next(left)] = 0
        return forced

    return force


class OnFixedBuffers(HFBackend):
    """Its sessions work as on CUDA: short pieces over fixed buffers, which the next session takes over."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, writes=True)

    def open(self, lanes: int = 1, capacity: int = 0) -> HFSession:
        with patch.object(hf_session, "_on_fixed_buffers", lambda loaded, cache: True):
            return super().open(lanes, capacity)


def on_fixed_buffers(member: Member) -> Member:
    """The member, computed as on CUDA; nothing is captured on the CPU."""
    facts = {one.name: getattr(member.backend, one.name) for one in fields(LoadedModel)}
    return replace(member, backend=OnFixedBuffers(**facts))
