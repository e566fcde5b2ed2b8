"""Several texts through a member in an actor: a step of all lanes is one call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from deepen_ext.errors import InputError
from deepen_ext.ground.closing import Closing
from deepen_ext.members.asking import (
    check_ids,
    check_lane,
    check_positions,
    check_start,
    common_prefix,
    lane_count,
)
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.ray.remote import RemoteMember
from deepen_ext.members.ray.wire import NewIds, Request, pack_request, unpack_reply
from deepen_ext.ops.topk_softmax import TopK


class RaySession(Closing):
    """See `members.backend.Session`.

    Both sides note a lane's text as it was last asked for, also where that fails, so that a call names what
    is new alone. What the model really holds is known to the session in the actor.
    """

    def __init__(self, backend: RemoteMember, lanes: int, capacity: int) -> None:
        """Open a session in the actor.

        Raises:
            InputError: less than one lane.
            ModelError: the backend in the actor has no session of so many lanes; the actor is lost.
        """
        self._count = lane_count(backend.name, lanes)
        self._backend = backend
        self._number = backend.open_in_actor(lanes, capacity)
        self._texts: dict[int, list[int]] = {lane: [] for lane in range(lanes)}  # but for released lanes
        # Dropped without `close`, it is closed with the next call. Calls are not made from here: garbage is
        # collected at any time, also while Ray holds its locks.
        self._dropped = weakref.finalize(self, backend.dropped.append, self._number)
        self._dropped.atexit = False

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """See `Session`: nothing of it is here."""
        return {}

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> RayAnswer:
        """See `Session`. The actor works when this returns."""
        backend = self._backend
        wanted = {lane: list(ids) for lane, ids in targets.items()}
        for lane, ids in wanted.items():
            self._check(lane, ids)
        counts = check_positions(backend.name, wanted, positions)
        k = backend.most_topk(k)
        if not wanted:
            return RayAnswer(backend, k, None)
        texts = [self._news(lane, ids, counts[lane]) for lane, ids in wanted.items()]
        return RayAnswer(backend, k, backend.call("ask", pack_request(Request(self._number, k, texts))))

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """See `Session`; a call for each block, which the actor's backend cuts."""
        wanted = list(ids)
        self._check(lane, wanted)
        check_start(self._backend.name, wanted, start)
        return self._read(lane, wanted, start, k)

    def _read(self, lane: int, ids: list[int], start: int, k: int) -> Iterator[Distribution]:
        backend, left = self._backend, len(ids) - start
        k = backend.most_topk(k)
        self._check(lane, ids)
        news = self._news(lane, ids, start)
        reference = backend.call("read", pack_request(Request(self._number, k, [news])))
        while True:
            block = RayAnswer(backend, k, reference).wait()
            yield block
            left -= len(block)
            if left <= 0:
                return
            self._check(lane, ids)
            if self._texts[lane] != ids:
                raise InputError(
                    f"{backend.name}: lane {lane} was given other ids while it was read; read it to its end"
                )
            reference = backend.call("read_on", self._number, lane)

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """See `Session`."""
        check_lane(self._backend.name, lane, self._count, self._texts)
        if forget:
            self._texts[lane] = []
        self._backend.tell("set_aside", self._number, lane, forget)

    def release(self, lane: int) -> None:
        """See `Session`."""
        check_lane(self._backend.name, lane, self._count, self._texts)
        del self._texts[lane]
        self._backend.tell("release", self._number, lane)

    def close(self) -> None:
        """See `Session`."""
        self._texts.clear()
        if self._dropped.detach() is not None:
            self._backend.tell("close", self._number)

    def _check(self, lane: int, ids: list[int]) -> None:
        check_lane(self._backend.name, lane, self._count, self._texts)
        check_ids(self._backend, lane, self._count, ids)

    def _news(self, lane: int, ids: list[int], positions: int) -> NewIds:
        kept = common_prefix(self._texts[lane], ids)
        self._texts[lane] = ids
        return NewIds(lane, kept, ids[kept:], positions)


class RayAnswer:
    """See `members.backend.Answer`: a call that is under way, or None where nothing was asked."""

    def __init__(self, backend: RemoteMember, k: int, reference: Any) -> None:
        self._backend = backend
        self._k = k
        self._reference = reference

    def wait(self) -> Distribution:
        """The distributions.

        Raises:
            MemberLost: the actor is gone, or gives no answer in time.
            ModelError: the forward pass failed.
        """
        backend = self._backend
        top = _nothing(self._k) if self._reference is None else unpack_reply(backend.get(self._reference))
        return Distribution(backend.name, backend.vocab_size, top.ids.shape[1], known_topk=top)

    def ready(self) -> bool:
        """See `Answer`."""
        return self._reference is None or self._backend.is_done(self._reference)


def _nothing(k: int) -> TopK:
    ids = torch.empty((0, k), dtype=torch.int32, device="cpu")
    row = torch.empty(0, dtype=torch.float32, device="cpu")
    return TopK(ids, ids.float(), row, row.to(torch.int32))
