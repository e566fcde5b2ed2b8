"""Sessions as tests use them: the logits themselves, and members with another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from deepen_ext.members.backend import Session
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
