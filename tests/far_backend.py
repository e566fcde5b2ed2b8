"""Members that compute in this process and pass for members elsewhere; they hold their users to a promise."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from time import sleep
from typing import Any, ClassVar

from deepen_ext.members.backend import Answer, Capabilities, Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.loaded_model import LoadedModel
from deepen_ext.members.member import Member


class FarBackend(HFBackend):
    """A model of transformers that is elsewhere while its name is in `names`.

    Attributes:
        names: who is elsewhere now.
        ready: whether an answer is there already; asked each time.
        events: of all such members, what was called, by name: "ask main", "wait main".
        positions: of each `ask`, how many positions a lane was asked about; with the member's name.
        seconds: that each `wait` for a member elsewhere takes.
        broken: called by each `ask` with the member's name.
    """

    names: ClassVar[set[str]] = set()
    ready: ClassVar[Callable[[], bool]] = lambda: True
    events: ClassVar[list[str]] = []
    positions: ClassVar[list[tuple[str, list[int]]]] = []
    seconds: ClassVar[float] = 0.0
    broken: ClassVar[Callable[[str], None]] = lambda name: None
    sessions: ClassVar[list[FarSession]] = []

    @classmethod
    def reset(cls) -> None:
        """Nobody is elsewhere; nothing was called."""
        cls.names = set()
        cls.ready = lambda: True
        cls.broken, cls.seconds = lambda name: None, 0.0
        cls.events, cls.positions, cls.sessions = [], [], []

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, elsewhere=self.name in self.names)

    def open(self, lanes: int = 1, capacity: int = 0) -> Any:
        session = FarSession(self, super().open(lanes, capacity))
        type(self).sessions.append(session)
        return session


class FarSession:
    """Of `FarBackend`."""

    def __init__(self, backend: FarBackend, session: Session) -> None:
        self._backend = backend
        self._session = session
        self.under_way = False
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> FarAnswer:
        assert not self.under_way, "asked again before the answer was waited for"
        backend = self._backend
        each = positions if isinstance(positions, Mapping) else dict.fromkeys(targets, positions)
        backend.events.append(f"ask {backend.name}")
        backend.positions.append((backend.name, list(each.values())))
        type(backend).broken(backend.name)
        self.under_way = True
        return FarAnswer(self, self._session.ask(targets, k, positions), backend.name)

    def release(self, lane: int) -> None:
        assert not self.under_way
        self._session.release(lane)

    def close(self) -> None:
        self.closed = True
        self._session.close()


@dataclass(frozen=True)
class FarAnswer:
    """Of `FarSession`."""

    session: FarSession
    answer: Answer
    name: str

    def wait(self) -> Distribution:
        FarBackend.events.append(f"wait {self.name}")
        assert self.session.under_way, "waited for twice"
        self.session.under_way = False
        sleep(FarBackend.seconds if self.name in FarBackend.names else 0.0)
        return self.answer.wait()

    def ready(self) -> bool:
        return FarBackend.ready()


def far(member: Member) -> Member:
    """The member, which may be elsewhere."""
    facts = {one.name: getattr(member.backend, one.name) for one in fields(LoadedModel)}
    return replace(member, backend=FarBackend(**facts))


def some_elsewhere(rng: random.Random, names: Sequence[str]) -> None:
    """From now on about half of these are elsewhere, and their answers come now or later."""
    chance = rng.choice([0.0, 0.5, 1.0])
    FarBackend.reset()
    FarBackend.names = {name for name in names if rng.random() < 0.6}
    FarBackend.ready = lambda: rng.random() < chance
