"""What the lanes of a session hold, and where in the KV cache each of them lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from deepen_ext.members.asking import check_lane, common_prefix
from deepen_ext.members.hf.feed_plan import SHARED
from deepen_ext.members.hf.kv_cache import LaneCache


class Lanes:
    """The ids of each lane, as far as their states are surely in the cache.

    A lane keeps its number; its states move. Lanes in use lie side by side in the cache, so that a forward
    reads them without copies: lane n is the cache's lane `cache_lane(n)`.
    """

    def __init__(self, name: str, count: int, cache: LaneCache) -> None:
        self.count = count
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self._name = name
        self._cache = cache
        self._order = list(range(count))  # the lanes not released, as they lie in the cache
        self._aside: set[int] = set()  # of these, lanes that nobody feeds for now

    def cache_lane(self, lane: int) -> int:
        """Where in the cache the lane lies."""
        return self._order.index(lane)

    def at(self, cache_lane: int) -> int | None:
        """Which lane lies there; None where its lane was released."""
        return self._order[cache_lane] if cache_lane < len(self._order) else None

    def check(self, lane: int) -> None:
        """Raise InputError for a lane that does not exist or was released."""
        check_lane(self._name, lane, self.count, self._order)

    def take_back(self, lanes: Sequence[int], stream: AbstractContextManager[None]) -> None:
        """These lanes are fed again. Those that were set aside go to the end of the ones in use."""
        back = [lane for lane in lanes if lane in self._aside]
        if not back:
            return
        with stream:
            for lane in back:
                in_use = len(self._order) - len(self._aside)
                self._exchange(lane, self._order[in_use] if in_use < self.cache_lane(lane) else lane)
                self._aside.remove(lane)

    def copy_prefixes(self, wanted: Mapping[int, list[int]], positions: Mapping[int, int]) -> None:
        """What another lane holds of a lane's ids need not be fed: the lane takes its states.

        A lane's last `positions` ids are fed in any case, for their logits.
        """
        for lane, ids in wanted.items():
            start, most = len(self.ids[lane]), len(ids) - positions[lane]
            if most - start < SHARED:
                continue
            common = {other: common_prefix(self.ids[other], ids) for other in self._order}
            source = max(common, key=lambda other: common[other])
            end = min(common[source], most)
            if end - start >= SHARED:
                self._cache.copy_prefix(self.cache_lane(source), self.cache_lane(lane), start, end)
                self.ids[lane].extend(ids[start:end])

    def release(self, lane: int, stream: AbstractContextManager[None]) -> None:
        """The lane is not fed any more; the lanes behind it in the cache move up."""
        at = self.cache_lane(lane)
        self.ids[lane] = []
        with self._moving(self._order[at + 1 :]), stream:
            self._cache.close_gap(at, len(self._order))
            self._order.remove(lane)
        self._aside.discard(lane)

    def set_aside(self, lane: int, stream: AbstractContextManager[None]) -> None:
        """The lane is not fed for a while: it changes places with the last one in use."""
        self._aside.add(lane)
        in_use = [other for other in self._order if other not in self._aside]
        if not in_use:
            return
        if self.cache_lane(lane) < self.cache_lane(in_use[-1]):
            with stream:
                self._exchange(lane, in_use[-1])

    def _exchange(self, lane: int, other: int) -> None:
        """Two lanes change places in the cache."""
        if lane == other:
            return
        one, two = self.cache_lane(lane), self.cache_lane(other)
        end = max(len(self.ids[lane]), len(self.ids[other]))
        with self._moving([lane, other]):
            self._cache.exchange(one, two, end)
            self._order[one], self._order[two] = other, lane

    def clear(self) -> None:
        """Release all."""
        self._order.clear()

    @contextmanager
    def _moving(self, lanes: Sequence[int]) -> Iterator[None]:
        """The states of these lanes move here; should that be interrupted, the lanes hold nothing."""
        held = {lane: self.ids[lane] for lane in lanes}
        for lane in held:
            self.ids[lane] = []
        yield
        for lane, ids in held.items():
            self.ids[lane] = ids
