"""Texts through a server. Their states are the server's: a lane here is what was last asked of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from deepen_ext.members.asking import check_ids, check_lane, check_positions, check_start, lane_count
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.members.http.protocols.base import Question
from deepen_ext.members.http.rows import to_topk
from deepen_ext.members.http.served_model import ServedModel
from deepen_ext.ops.topk_softmax import TopK


class HttpSession:
    """See `members.backend.Session`.

    Nothing is rolled back or kept here: every request has the whole text, of which the server's prefix cache
    keeps what it has read.
    """

    def __init__(self, backend: ServedModel, lanes: int) -> None:
        """Nothing is asked yet.

        Raises:
            InputError: no lanes.
        """
        self._backend = backend
        self._count = lane_count(backend.name, lanes)
        self._slots: dict[int, int | None] = dict(enumerate(backend.take_slots(lanes)))
        self._known: dict[int, _Known] = {}

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """None here."""
        return {}

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> HttpAnswer:
        """See `Session`: a request for each lane, all under way together."""
        backend = self._backend
        wanted = {lane: list(ids) for lane, ids in targets.items()}
        for lane, ids in wanted.items():
            self._check(lane, ids)
        counts = check_positions(backend.name, wanted, positions)
        size = backend.most(k)
        parts = []
        for lane, ids in wanted.items():
            known = self._known.get(lane)
            if known is not None and known.says(ids, counts[lane], size):
                length = len(known.said)
                parts.append(_Part(lane, ids, known.said.at(range(length - counts[lane], length))))
                continue
            self._known.pop(lane, None)
            most = backend.protocol.most_positions
            asked = self._questions(lane, ids, len(ids) - counts[lane], size, most)
            parts.append(_Part(lane, ids, [backend.start(one) for one in asked]))
        return HttpAnswer(self, parts, size)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """See `Session`."""
        wanted = list(ids)
        self._check(lane, wanted)
        check_start(self._backend.name, wanted, start)
        return self._read(lane, wanted, start, self._backend.most(k))

    def _read(self, lane: int, ids: list[int], start: int, k: int) -> Iterator[Distribution]:
        self._known.pop(lane, None)
        for asked in self._questions(lane, ids, start, k, self._backend.protocol.read_block):
            self._check(lane, ids)
            yield self.said(self._backend.answer(asked, read=True), k)

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """See `Session`. Only what is asked for is sent; what the server holds is its own affair."""
        check_lane(self._backend.name, lane, self._count, self._slots)
        if forget:
            self._known.pop(lane, None)

    def release(self, lane: int) -> None:
        """See `Session`."""
        check_lane(self._backend.name, lane, self._count, self._slots)
        self._known.pop(lane, None)
        self._backend.give_slot(self._slots.pop(lane))

    def close(self) -> None:
        """See `Session`."""
        for lane in list(self._slots):
            self.release(lane)

    def said(self, topk: TopK, k: int) -> Distribution:
        """A distribution of this member."""
        return Distribution(self._backend.name, self._backend.vocab_size, k, known_topk=topk)

    def nothing(self, k: int) -> TopK:
        """Of no positions."""
        return to_topk([], k, self._backend.vocab_size, self._backend.device)

    def keep(self, lane: int, ids: list[int], said: Distribution) -> None:
        """What was said of a lane's text: asked again, it is here."""
        if lane in self._slots:
            self._known[lane] = _Known(ids, said)

    def _check(self, lane: int, ids: list[int]) -> None:
        check_lane(self._backend.name, lane, self._count, self._slots)
        check_ids(self._backend, lane, self._count, ids)

    def _questions(self, lane: int, ids: list[int], start: int, k: int, most: int) -> Iterator[Question]:
        """The distributions after ``ids[start]`` and all later ids, `most` of them in a request."""
        slot = self._slots.get(lane)
        for at in range(start, len(ids), most):
            end = min(at + most, len(ids))
            yield Question(ids[:end], end - at, k, slot)


@dataclass(frozen=True)
class _Known:
    ids: list[int]
    said: Distribution

    def says(self, ids: list[int], positions: int, k: int) -> bool:
        return self.said.k >= k and len(self.said) >= positions and self.ids == ids


@dataclass(frozen=True)
class _Part:
    """A lane's share of an answer: what was known already, or requests under way."""

    lane: int
    ids: list[int]
    said: Distribution | list[Future[TopK]]


@dataclass(frozen=True)
class HttpAnswer:
    """See `members.backend.Answer`."""

    session: HttpSession
    parts: list[_Part]
    k: int

    def wait(self) -> Distribution:
        """The distributions.

        Raises:
            MemberLost: a request failed. Those that have not begun are not made any more, and the others are
                waited for.
        """
        failed: Exception | None = None
        found = []
        for part in self.parts:
            if isinstance(part.said, Distribution):
                found.append(part.said.top(self.k))
                continue
            rows = []
            for future in part.said:
                if failed is not None and future.cancel():
                    continue
                try:
                    rows.append(self.session.said(future.result(), self.k))
                except Exception as error:
                    failed = failed or error
            if failed is None:
                found.append(joined(rows))
                self.session.keep(part.lane, part.ids, found[-1])
        if failed is not None:
            raise failed
        return joined(found) if found else self.session.said(self.session.nothing(self.k), self.k)

    def ready(self) -> bool:
        """See `Answer`."""
        requests = [part.said for part in self.parts if not isinstance(part.said, Distribution)]
        return all(future.done() for own in requests for future in own)
