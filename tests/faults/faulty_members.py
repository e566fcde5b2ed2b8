"""Two tiny members whose forward passes fail at a chosen moment, in backends that count open sessions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from losing_backend import backend_of, losing

from deepen_ext import Ensemble, load_member
from deepen_ext.members.member import Member

PROMPT = "Once upon a time"
NEW = 5


def members_of(folders: list[Path]) -> list[Member]:
    """Members of these folders; `check_free` says whether a session is open."""
    return [losing(load_member(folder)) for folder in folders]


def ensemble_of(members: list[Member], **settings: Any) -> Ensemble:
    """Both are asked about every token."""
    return Ensemble(members, **{"fuser": "average", "boundary_aware": False, "cache": False, **settings})


@contextmanager
def failing(member: Member, at: int, error: Callable[[], BaseException]) -> Iterator[list[int]]:
    """The member's `at`-th forward raises this, in its last layer. Counts the forwards, in a list of one."""
    count = [0]
    last = member.model.model.layers[-1]

    def hook(*_: Any) -> None:
        count[0] += 1
        if count[0] == at + 1:
            raise error()

    handle = last.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def arm(members: list[Member]) -> None:
    """No session is open yet."""
    for member in members:
        backend_of(member).arm(None)


def check_free(members: list[Member]) -> None:
    """No session is open, and none holds a cache."""
    gc.collect()
    for member in members:
        backend = backend_of(member)
        backend.check_free()
        assert not any(sum(one.bytes_held.values()) for one in backend.sessions)
