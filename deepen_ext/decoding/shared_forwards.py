"""Forward passes shared by several runs over the same prompts, to compare ways of fusing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol

import torch

from deepen_ext.errors import InputError
from deepen_ext.members.hf.session import BatchSession
from deepen_ext.members.member import Member

_MOST_BYTES = 2 << 30  # of logits kept


class Session(Protocol):
    """What a run needs of a member: see `BatchSession`."""

    def sync(self, targets: Mapping[int, Sequence[int]]) -> torch.Tensor: ...  # noqa: D102
    def read(self, row: int, ids: Sequence[int], start: int = 0) -> Iterator[torch.Tensor]: ...  # noqa: D102
    def release(self, row: int) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class SharedForwards:
    """Members' caches and logits, kept from run to run: ``ensemble.generate(prompts, shared=shared)``.

    Ensembles of the same `Member` objects that continue the same prompts, one after the other, then read each
    prompt once for each member, and what they write alike (from one prompt two methods often go the same way
    for a while) costs one forward. The results are those without it, but for the rounding of sums, which
    depends on what a row was fed with.

    Make one for each batch of prompts; row b of every run must be the same prompt for this to gain anything.
    Leaving the ``with`` block frees everything.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        """Nothing is allocated; `max_bytes` bounds the logits that are kept, beside the caches."""
        self._free_bytes = max_bytes
        self._sessions: dict[tuple[int, int], BatchSession] = {}
        self._logits: dict[int, dict[tuple[int, ...], torch.Tensor]] = {}
        self._members: dict[int, Member] = {}  # keeps the ids of the objects theirs
        self._closed = False

    def __enter__(self) -> SharedForwards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all caches and logits."""
        self._closed = True
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._logits.clear()

    def session(self, member: Member, rows: int, capacity: int) -> Session:
        """A session that goes on from what earlier ones of the member left.

        Raises:
            InputError: this was closed.
        """
        if self._closed:
            raise InputError("these shared forwards were closed; make new ones for the next prompts")
        self._members[id(member)] = member
        key = id(member), rows
        if key not in self._sessions:
            self._sessions[key] = BatchSession(member, rows, capacity=capacity)
        return _SharedSession(self, self._sessions[key], self._logits.setdefault(id(member), {}))

    def cache_bytes(self, member: Member, rows: int) -> int:
        """Bytes of the caches that a run of so many rows finds here already."""
        session = self._sessions.get((id(member), rows))
        return 0 if session is None else session.cache_bytes

    def keep(
        self, kept: dict[tuple[int, ...], torch.Tensor], ids: tuple[int, ...], row: torch.Tensor
    ) -> None:
        """Keep a row's logits [V] while there is room."""
        if row.nbytes <= self._free_bytes:
            self._free_bytes -= row.nbytes
            kept[ids] = row.clone()


class _SharedSession:
    """One run's view of a session that outlives it: rows are set aside, not released."""

    def __init__(
        self, shared: SharedForwards, session: BatchSession, kept: dict[tuple[int, ...], torch.Tensor]
    ) -> None:
        self._shared = shared
        self._session = session
        self._kept = kept

    def sync(self, targets: Mapping[int, Sequence[int]]) -> torch.Tensor:
        keys = {row: tuple(ids) for row, ids in targets.items()}
        missing = {row: targets[row] for row, ids in keys.items() if ids not in self._kept}
        given = self._session.sync(missing)
        fresh = dict(zip(missing, given, strict=True))
        for row, logits in fresh.items():
            self._shared.keep(self._kept, keys[row], logits)
        if len(fresh) == len(keys):
            return given
        return torch.stack([fresh[row] if row in fresh else self._kept[ids] for row, ids in keys.items()])

    def read(self, row: int, ids: Sequence[int], start: int = 0) -> Iterator[torch.Tensor]:
        return self._session.read(row, ids, start)

    def release(self, row: int) -> None:
        self._session.set_aside(row)

    def close(self) -> None:
        pass


def open_session(member: Member, rows: int, capacity: int, shared: SharedForwards | None) -> Session:
    """A session of its own, or one of the shared ones."""
    if shared is not None:
        return shared.session(member, rows, capacity)
    return BatchSession(member, rows, capacity=capacity)
