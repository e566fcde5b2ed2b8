"""What runs in a member's actor: the member in a backend of this package, and its sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from deepen_ext.cluster.actors import Actor, answered
from deepen_ext.ground.collector import without_collector
from deepen_ext.members.backend import Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member
from deepen_ext.members.ray.wire import NewIds, pack_reply, unpack_request


@dataclass
class _Held:
    """A session, each lane's text as it was last asked for, and the readings that have not ended."""

    session: Session
    texts: dict[int, list[int]] = field(default_factory=dict)
    readings: dict[int, Iterator[Distribution]] = field(default_factory=dict)

    def text_of(self, new: NewIds) -> list[int]:
        """The lane's whole text. It is noted before anything can fail, as the asking side does."""
        text = self.texts[new.lane] = [*self.texts.get(new.lane, ())[: new.kept], *new.ids]
        return text


class MemberActor(Actor):
    """One member and its sessions, by their numbers. Calls come in order."""

    def __init__(self) -> None:
        """Nothing is loaded yet, so that finding a place and loading can be told apart."""
        self._member: Member | None = None
        self._sessions: dict[int, _Held] = {}

    @property
    def member(self) -> Member:
        """The member that was loaded."""
        assert self._member is not None
        return self._member

    @answered
    def load(self, load: Callable[..., Member], name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load the member; what the other side has to know of it.

        Args:
            load: a function as `load_member`.
            name: of the member, as `load_member` takes it.
            options: those of `load_member`.
        """
        with without_collector():
            member = self._member = load(name, **options)
        backend = member.backend
        return {
            "name": member.name,
            "vocab_size": backend.vocab_size,
            "context_length": backend.context_length,
            "repeatable": backend.capabilities.repeatable,
            "max_topk": backend.capabilities.max_topk,
            "eos_ids": member.eos_ids,
            "description": asdict(backend.describe()),
        }

    def vocabulary(self) -> str:
        """The fingerprint of its tokens."""
        return self.member.vocabulary.fingerprint

    @answered
    def fingerprint(self, dtype: str | None) -> str:
        """See `Backend.fingerprint`; the dtype by its name in torch."""
        return self.member.backend.fingerprint(None if dtype is None else getattr(torch, dtype))

    @answered
    def open(self, number: int, lanes: int, capacity: int) -> None:
        """See `Backend.open`. The number is the asking side's, which can close what it never saw open."""
        self._sessions[number] = _Held(self.member.backend.open(lanes, capacity))

    @answered
    def ask(self, request: bytes) -> bytes:
        """See `Session.ask`; the top-k is taken here."""
        number, k, texts = unpack_request(request)
        held = self._sessions[number]
        wanted = {one.lane: held.text_of(one) for one in texts}
        counts = {one.lane: one.positions for one in texts}
        return pack_reply(held.session.ask(wanted, k, counts).wait().topk)

    @answered
    def read(self, request: bytes) -> bytes:
        """Begin `Session.read` in a lane; its first block. `positions` is the start there."""
        number, k, (new,) = unpack_request(request)
        held = self._sessions[number]
        held.readings[new.lane] = held.session.read(new.lane, held.text_of(new), new.positions, k)
        return self._next_block(held, new.lane)

    @answered
    def read_on(self, number: int, lane: int) -> bytes:
        """The next block of a reading that has not ended."""
        return self._next_block(self._sessions[number], lane)

    def set_aside(self, number: int, lane: int, forget: bool) -> None:
        """See `Session`. Nobody waits for this, or for the next two."""
        held = self._sessions[number]
        held.session.set_aside(lane, forget=forget)
        if forget:
            held.texts.pop(lane, None)
            held.readings.pop(lane, None)

    def release(self, number: int, lane: int) -> None:
        """See `Session`."""
        held = self._sessions[number]
        held.session.release(lane)
        held.texts.pop(lane, None)
        held.readings.pop(lane, None)

    def close(self, number: int) -> None:
        """Free a session, if it is there."""
        if (held := self._sessions.pop(number, None)) is not None:
            held.session.close()

    @staticmethod
    def _next_block(held: _Held, lane: int) -> bytes:
        return pack_reply(next(held.readings[lane]).topk)
