"""A member in an actor: what is known of it here, and calls of it."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from deepen_ext.cluster.actors import Lost, TimeUp, get
from deepen_ext.errors import MemberLost

DEFAULT_SECONDS = 600.0  # of one call; the death of an actor is noticed at once, whatever this is


class RemoteMember:
    """A member in an actor, as its sessions see it. Threads may share it.

    Attributes:
        name: see `Backend`, as the next two.
        vocab_size: see above.
        context_length: see above.
        actor: its handle.
        facts: what its `load` gave.
        fingerprints: those that were asked for, by the name of the dtype.
        dropped: numbers of sessions that nothing holds any more and that the actor still has.
    """

    def __init__(self, actor: Any, facts: Mapping[str, Any], seconds: float | None = None) -> None:
        """Wrap an actor that has loaded its member.

        Args:
            actor: a handle of a `MemberActor`. When no handle is left, Ray ends the actor.
            facts: what its `load` gave.
            seconds: time limit of one call; None for the default.
        """
        self.name: str = facts["name"]
        self.vocab_size: int = facts["vocab_size"]
        self.context_length: int | None = facts["context_length"]
        self.actor = actor
        self.facts = facts
        self.fingerprints: dict[str | None, str] = {}
        self.dropped: deque[int] = deque()
        self._seconds = DEFAULT_SECONDS if seconds is None else seconds

    def most_topk(self, k: int) -> int:
        """Of k tokens, how many an answer has."""
        return min(k, self.facts["max_topk"] or k, self.vocab_size)

    def open_in_actor(self, lanes: int, capacity: int) -> int:
        """Open a session there; its number."""
        while self.dropped:
            self.tell("close", self.dropped.popleft())
        number = secrets.randbits(31)
        try:
            self.get(self.call("open", number, lanes, capacity))
        except MemberLost:  # after a time limit it is opened all the same
            self.dropped.append(number)
            raise
        return number

    def call(self, method: str, *args: Any) -> Any:
        """Start a call of the actor's; what to wait for. Calls are done in the order of their start."""
        import ray

        try:
            return getattr(self.actor, method).remote(*args)
        except ray.exceptions.RayError as error:
            raise self._lost(str(error).strip()) from error

    def tell(self, method: str, *args: Any) -> None:
        """A call that nobody waits for: it frees something, and a lost actor holds nothing."""
        with suppress(MemberLost):
            self.call(method, *args)

    def get(self, reference: Any) -> Any:
        """What a call gives.

        Raises:
            MemberLost: the actor is gone, or the time is up.
            ModelError: the call failed in the actor.
        """
        try:
            return get(reference, self._seconds)
        except TimeUp as error:
            cure = "when it is free again the next text works; give it more time by `timeout`"
            raise MemberLost(self.name, f"{error}; {cure}") from error
        except Lost as error:
            raise self._lost(str(error)) from error

    def is_done(self, reference: Any) -> bool:
        """Whether `get` has nothing to wait for."""
        import ray

        return bool(ray.wait([reference], timeout=0)[0])

    def _lost(self, why: str) -> MemberLost:
        return MemberLost(self.name, f"{why}; load the ensemble anew")
