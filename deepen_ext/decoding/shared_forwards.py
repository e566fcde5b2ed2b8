"""Forward passes shared by several runs over the same prompts, to compare ways of fusing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepen_ext.errors import InputError
from deepen_ext.ground.closing import Closing
from deepen_ext.members.backend import Answer, Session
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.members.member import Member

_MOST_BYTES = 2 << 30  # of distributions kept

# What a member said after some ids, one position each.
_Kept = dict[tuple[int, ...], Distribution]


class SharedForwards(Closing):
    """Members' caches and what they said, kept over runs: ``ensemble.generate(prompts, shared=shared)``.

    Ensembles of the same `Member` objects that continue the same prompts, one after the other, then read each
    prompt once for each member, and what they write alike (from one prompt two methods often go the same way
    for a while) costs one forward. The results are those without it, but for the rounding of sums, which
    depends on what a text was fed with.

    Make one for each batch of prompts; text b of every run must be the same prompt for this to gain anything.
    Leaving the ``with`` block frees everything.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        """Nothing is allocated; `max_bytes` bounds the distributions that are kept, beside the caches."""
        self._free_bytes = max_bytes
        self._sessions: dict[tuple[int, int], Session] = {}
        self._kept: dict[int, _Kept] = {}
        self._members: dict[int, Member] = {}  # so that no other object gets their id
        self._closed = False

    def close(self) -> None:
        """Free all caches and distributions."""
        self._closed = True
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._kept.clear()

    def session(self, member: Member, lanes: int, capacity: int) -> Session:
        """A session that goes on from what earlier ones of the member left.

        Raises:
            InputError: this was closed.
        """
        if self._closed:
            raise InputError("these shared forwards were closed; make new ones for the next prompts")
        self._members[id(member)] = member
        key = id(member), lanes
        if key not in self._sessions:
            self._sessions[key] = member.backend.open(lanes, capacity)
        most = member.backend.capabilities.max_topk
        return _SharedSession(self, self._sessions[key], self._kept.setdefault(id(member), {}), most)

    def bytes_held(self, member: Member, lanes: int) -> Mapping[torch.device, int]:
        """Bytes by device of the caches that a run of so many texts finds here already."""
        session = self._sessions.get((id(member), lanes))
        return {} if session is None else session.bytes_held

    def keep(self, kept: _Kept, ids: tuple[int, ...], said: Distribution) -> None:
        """Keep what was said after these ids while there is room."""
        if said.nbytes <= self._free_bytes:
            self._free_bytes -= said.nbytes
            kept[ids] = said.clone()


class _SharedSession:
    """One run's view of a session that outlives it: lanes are set aside, not released."""

    def __init__(self, shared: SharedForwards, session: Session, kept: _Kept, most: int | None) -> None:
        self._shared = shared
        self._session = session
        self._kept = kept
        self._most = most  # tokens of a top-k; None for any

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        return self._session.bytes_held

    def ask(self, targets: Mapping[int, Sequence[int]], k: int, positions: int = 1) -> Answer:
        if positions > 1:
            return self._session.ask(targets, k, positions)
        k = k if self._most is None else min(k, self._most)
        keys = {lane: tuple(ids) for lane, ids in targets.items()}
        known = {lane: said for lane, ids in keys.items() if (said := self._known(ids, k)) is not None}
        missing = {lane: targets[lane] for lane in targets if lane not in known}
        answer = self._session.ask(missing, k) if missing else None
        return _SharedAnswer(self._shared, self._kept, keys, known, answer)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        return self._session.read(lane, ids, start, k)

    def set_aside(self, lane: int) -> None:
        self._session.set_aside(lane)

    def release(self, lane: int) -> None:
        self._session.set_aside(lane)

    def close(self) -> None:
        pass

    def _known(self, ids: tuple[int, ...], k: int) -> Distribution | None:
        """What is kept of these ids, if its top-k is or can be as large."""
        said = self._kept.get(ids)
        return None if said is None or (said.logits is None and said.k < k) else said.top(k)


@dataclass(frozen=True)
class _SharedAnswer:
    shared: SharedForwards
    kept: _Kept
    keys: dict[int, tuple[int, ...]]
    known: dict[int, Distribution]
    answer: Answer | None

    def wait(self) -> Distribution:
        found = dict(self.known)
        if self.answer is not None:
            given = self.answer.wait()
            fresh = [lane for lane in self.keys if lane not in self.known]
            for i, lane in enumerate(fresh):
                found[lane] = given.at([i])
                self.shared.keep(self.kept, self.keys[lane], found[lane])
            if not self.known:
                return given
        return joined([found[lane] for lane in self.keys])


def open_session(member: Member, lanes: int, capacity: int, shared: SharedForwards | None) -> Session:
    """A session of its own, or one of the shared ones."""
    if shared is not None:
        return shared.session(member, lanes, capacity)
    return member.backend.open(lanes, capacity)
