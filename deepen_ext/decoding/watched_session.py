"""A member's session that remembers how the member was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import torch

from deepen_ext.errors import DeepenError, MemberLost
from deepen_ext.members.backend import Answer, Choose, Session, WritingSession
from deepen_ext.members.distribution import Distribution


class WatchedSession:
    """A session. Once its member is lost, every question gets the same error, and nobody is asked.

    What may fail in silence is to release a lane or to close: that no text needs any more.

    Attributes:
        error: how the member was lost; None as long as it is there.
    """

    def __init__(self, opened: Callable[[], Session]) -> None:
        """Open the session. A member that is lost by then is found out when it is asked."""
        self.error: MemberLost | None = None
        self._session: Session | None = None
        self._under_way: _WatchedAnswer | None = None
        with suppress(MemberLost), self.watched():
            self._session = opened()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is done here may find out that the member is lost."""
        if self.error is not None:
            raise self.error
        try:
            yield
        except MemberLost as error:
            self.error = error
            raise

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> Answer:
        """See `Session`."""
        with self.watched():
            self._under_way = _WatchedAnswer(self, self._there.ask(targets, k, positions))
            return self._under_way

    def write(
        self, targets: Mapping[int, Sequence[int]], k: int, count: int, choose: Choose
    ) -> tuple[torch.Tensor, Distribution]:
        """See `WritingSession`; of a member that writes."""
        with self.watched():
            return cast(WritingSession, self._there).write(targets, k, count, choose)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """See `Session`."""
        with self.watched():
            yield from self._there.read(lane, ids, start, k)

    def settle(self) -> None:
        """Wait for what was asked, whatever comes of it: only then can the session be asked again."""
        if self._under_way is not None:
            with suppress(DeepenError):
                self._under_way.wait()

    def done(self) -> None:
        """Nothing is under way any more."""
        self._under_way = None

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """See `Session`."""
        with suppress(MemberLost), self.watched():
            self._there.set_aside(lane, forget=forget)

    def release(self, lane: int) -> None:
        """See `Session`."""
        with suppress(MemberLost), self.watched():
            self._there.release(lane)

    def close(self) -> None:
        """See `Session`."""
        if self._session is not None:
            with suppress(MemberLost):
                self._session.close()

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """See `Session`."""
        return {} if self._session is None else self._session.bytes_held

    @property
    def _there(self) -> Session:
        assert self._session is not None  # else there is an `error`
        return self._session


@dataclass(frozen=True)
class _WatchedAnswer:
    session: WatchedSession
    answer: Answer

    def wait(self) -> Distribution:
        self.session.done()
        with self.session.watched():
            return self.answer.wait()

    def ready(self) -> bool:
        return self.answer.ready()
