"""A backend around another one, whose member is lost at a chosen moment; and what a run leaves open there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deepen_ext.errors import MemberLost
from deepen_ext.members.backend import Answer, Capabilities, Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member

QUESTIONS = ("ask", "wait", "read")
EVERYTHING = (*QUESTIONS, "open", "release", "close")


class Losing:
    """As a server that goes away: from its `at`-th call on every call fails; None for never.

    Attributes:
        calls: the names of the calls so far.
        sessions: all that were opened.
        elsewhere: it is asked before the main model works.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.elsewhere = False
        self.interrupts = False  # KeyboardInterrupt may come while an answer is waited for
        self.arm(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def arm(self, at: int | None, kinds: Sequence[str] = QUESTIONS) -> None:
        """Be there again, and go away at this call of these kinds."""
        self.at = at
        self.kinds = kinds
        self.calls: list[str] = []
        self.sessions: list[LosingSession] = []
        self.lost = False

    def call(self, kind: str) -> None:
        """One more call: the member may be lost by it, or be lost already."""
        if not self.lost and kind in self.kinds:
            self.lost = (
                self.at is not None and len([one for one in self.calls if one in self.kinds]) >= self.at
            )
        self.calls.append(kind)
        if self.lost:
            raise MemberLost(self.backend.name, f"gone at {kind}")

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.backend.capabilities, elsewhere=self.elsewhere)

    def open(self, lanes: int = 1, capacity: int = 0) -> LosingSession:
        self.call("open")
        session = LosingSession(self, self.backend.open(lanes, capacity), lanes)
        self.sessions.append(session)
        return session

    def check_free(self) -> None:
        """Nothing is held: every session was closed."""
        assert all(one.closed for one in self.sessions)
        assert not any(one.held for one in self.sessions)


class LosingSession:
    """Of `Losing`. It holds its user to the promise of a session, too."""

    def __init__(self, backend: Losing, session: Session, lanes: int) -> None:
        self._backend = backend
        self._session = session
        self.under_way = False
        self.held = set(range(lanes))
        self.closed = False

    @property
    def bytes_held(self) -> Mapping[Any, int]:
        return self._session.bytes_held

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> LosingAnswer:
        assert not self.under_way, "asked again before the answer was waited for"
        assert not self.closed
        assert targets.keys() <= self.held
        self._backend.call("ask")
        answer = self._session.ask(targets, k, positions)
        self.under_way = True
        return LosingAnswer(self._backend, self, answer)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        assert not self.under_way
        for block in self._session.read(lane, ids, start, k):
            self._backend.call("read")
            yield block

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        self._session.set_aside(lane, forget=forget)

    def release(self, lane: int) -> None:
        assert not self.under_way
        self.held.discard(lane)
        self._session.release(lane)
        self._backend.call("release")

    def close(self) -> None:
        assert not self.under_way or self._backend.interrupts
        self.held.clear()
        self.closed = True
        self._session.close()
        self._backend.call("close")


class LosingAnswer:
    """Of `LosingSession`."""

    def __init__(self, backend: Losing, session: LosingSession, answer: Answer) -> None:
        self._backend = backend
        self._session = session
        self._answer = answer

    def wait(self) -> Distribution:
        self._session.under_way = False
        said = self._answer.wait()
        self._backend.call("wait")
        return said

    def ready(self) -> bool:
        return self._answer.ready()


def losing(member: Member) -> Member:
    """The member, which may be lost."""
    return replace(member, backend=Losing(member.backend))


def backend_of(member: Member) -> Losing:
    """The backend of such a member."""
    assert isinstance(member.backend, Losing)
    return member.backend
