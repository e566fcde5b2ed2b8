"""Several texts through one transformers model: only what is new of each goes through it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from deepen_ext.errors import InputError, ModelError, failures_of
from deepen_ext.ground.closing import Closing
from deepen_ext.ground.numbers import whole_number
from deepen_ext.members.asking import (
    check_ids,
    check_positions,
    check_start,
    common_prefix,
    lane_count,
    read_end,
)
from deepen_ext.members.backend import Choose
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.hf.answer import HFAnswer
from deepen_ext.members.hf.attention import share_heads
from deepen_ext.members.hf.feed_plan import fed_first
from deepen_ext.members.hf.forwards import Forwards, Known
from deepen_ext.members.hf.kv_cache import CHUNK, LaneCache
from deepen_ext.members.hf.lanes import Lanes
from deepen_ext.members.hf.loaded_model import LoadedModel, inner_model
from deepen_ext.members.hf.masks import check_batches
from deepen_ext.members.hf.placement import is_spread, layer_devices
from deepen_ext.members.hf.rooms import leave_room, take_room
from deepen_ext.members.hf.rotary import check_steady, steady_positions
from deepen_ext.members.hf.unread import Unread, write_unread

READ_BLOCK = 64  # positions of a block of logits (see `read_end`): 67 MB for 262,144 tokens in float32


class HFSession(Closing):
    """See `members.backend.Session`. Each lane has a KV cache that rolls back exactly.

    A lane that holds its ids already costs nothing if its logits are known, else one token. Lanes with about
    as much to feed go through the model together. A longer prefix that another lane holds is copied from
    there, and one that several of the lanes asked for begin with is fed once (`feed_plan`).
    """

    def __init__(self, loaded: LoadedModel, lanes: int = 1, *, capacity: int = 0) -> None:
        """Nothing is allocated before the first `ask`.

        Args:
            loaded: the model; its sessions do not meet.
            lanes: number of texts.
            capacity: expected tokens of a text. More may come.

        Raises:
            ModelError: the model's cache cannot be rolled back by tokens; its rotary positions change within
                the context (`rotary`); or with two or more lanes, the model cannot run texts of different
                lengths in one forward.
        """
        lanes = lane_count(loaded.name, lanes)
        check_steady(loaded)
        self._loaded = loaded
        share_heads(inner_model(loaded.model))
        self._room = take_room(loaded, lanes, capacity)
        self._cache = self._room.cache
        self._fixed = _on_fixed_buffers(loaded, self._cache)
        self._lanes = Lanes(loaded.name, lanes, self._cache)
        self._forwards = Forwards(loaded, self._lanes, self._room, fixed=self._fixed)
        self._known: dict[int, Known] = {}
        self._unread: Unread | None = None
        self._capacity = capacity if self._fixed else 0
        self._usable = True
        self._closed = False  # not the same as all lanes released, which is how a generation ends
        if self._room.stream is not None:  # for the weights, should they still be on their way
            self._room.stream.wait_stream(torch.cuda.current_stream(loaded.device))
        with self._on_own_stream():
            self._cache.zero()

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """See `Session`; what a closed session left for the model's next one is not its own any more."""
        if not is_spread(self._loaded.model):
            return {self._loaded.device: 0 if self._closed else self._cache.nbytes}
        devices = (self._loaded.device, *layer_devices(self._loaded.model).values())
        return dict.fromkeys(devices, 0) | ({} if self._closed else self._cache.bytes_by_device)

    @property
    def tokens_fed(self) -> int:
        """Tokens that ever went through the model, over all lanes."""
        return self._forwards.tokens_fed

    def ids(self, lane: int) -> list[int]:
        """Token ids that the lane's cache holds."""
        self._lanes.check(lane)
        self._take_unread()
        return list(self._lanes.ids[lane])

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> HFAnswer:
        """See `Session`. On CUDA the work goes on until `wait`; the logits are an inference tensor."""
        loaded = self._loaded
        wanted = {lane: list(ids) for lane, ids in targets.items()}
        for lane, ids in wanted.items():
            self._check(lane, ids)
        counts = check_positions(loaded.name, wanted, positions)
        if not wanted:
            logits = torch.empty((0, loaded.vocab_size), dtype=loaded.dtype, device=loaded.device)
            return self._answer(logits, k)
        self._take_unread()
        self._lanes.take_back(list(wanted), self._on_own_stream())
        unfed = self._roll_back(wanted, counts)
        self._usable = False  # for another session, should this fail
        with failures_of(loaded.name), self._work():
            self._let_go(unfed)
            self._cache.reserve(max(*map(len, wanted.values()), self._capacity))
            while unfed:
                self._lanes.copy_prefixes(unfed, counts)
                held = {lane: len(self._lanes.ids[lane]) for lane in unfed}
                now = fed_first(unfed, held, loaded.device.type)
                self._known |= self._forwards.feed(
                    {lane: unfed.pop(lane)[held[lane] :] for lane in now}, counts
                )
            logits = self._joined(counts)
        self._usable = True
        return self._answer(logits, k)

    def write(
        self, targets: Mapping[int, Sequence[int]], k: int, count: int, choose: Choose
    ) -> tuple[torch.Tensor, Distribution]:
        """See `WritingSession`; InputError also where the session works without fixed buffers."""
        loaded, wanted = self._loaded, {lane: list(ids) for lane, ids in targets.items()}
        count = whole_number(f"{loaded.name}: the number of tokens to write", count, 1)
        if not self._fixed or not wanted:
            reason = "nothing to write to" if self._fixed else "it works without fixed buffers"
            raise InputError(f"{loaded.name}: {reason}; ask token by token")
        for lane, ids in wanted.items():
            self._check(lane, ids + ids[-1:] * count)
        # For all tokens at once, so that no buffer moves in between.
        self._capacity = max(self._capacity, max(map(len, wanted.values())) + count)
        logits = self.ask(wanted, k).said.scores()
        self._usable = False
        with self._work(after_the_caller=True):
            unread = write_unread(loaded.name, self._forwards, list(wanted), logits, count, choose)
        self._unread, self._usable = unread, True
        if self._room.stream is not None:
            unread.tokens.record_stream(torch.cuda.current_stream(loaded.device))
        return unread.tokens, self._answer(unread.logits.flatten(0, 1), k).wait()

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """See `Session`; of the lane's present ids at most ``ids[:start]`` is kept."""
        wanted = list(ids)
        self._check(lane, wanted)
        check_start(self._loaded.name, wanted, start)
        return self._read(lane, wanted, start, k)

    def _read(self, lane: int, ids: list[int], start: int, k: int) -> Iterator[Distribution]:
        self._take_unread()
        held = self._lanes.ids
        at = min(common_prefix(held[lane], ids), start)
        self._known.pop(lane, None)
        del held[lane][at:]
        while at < len(ids):
            self._lanes.check(lane)
            self._take_unread()
            if held[lane] != ids[:at]:
                raise InputError(
                    f"{self._loaded.name}: lane {lane} was given other ids while it was read; read it to its "
                    "end"
                )
            end = read_end(at, start, len(ids), CHUNK, READ_BLOCK)
            self._usable = False
            with failures_of(self._loaded.name), self._work():
                self._cache.reserve(max(len(ids), self._capacity))
                logits = self._forwards.run_lane(lane, ids[at:end], end - at if at >= start else 1)[0]
                # A view would keep the whole block.
                self._known[lane] = Known(logits[None, -1:].clone(), 0, 1)
            block = self._answer(logits, k).wait()
            self._usable = True
            if at >= start:
                yield block
            del logits, block  # so that the next forward finds their memory free, if the reader kept nothing
            at = end

    def release(self, lane: int) -> None:
        """See `Session`."""
        self._lanes.check(lane)
        self._take_unread()
        self._known.pop(lane, None)
        self._lanes.release(lane, self._on_own_stream())

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """See `Session`. On the CPU the lanes that are still asked for stay side by side in the cache."""
        self._lanes.check(lane)
        if forget:
            self._take_unread()
            self._known.pop(lane, None)
            self._lanes.ids[lane] = []
        if not self._fixed:  # over fixed buffers all lanes are run at every step
            self._lanes.set_aside(lane, self._on_own_stream())

    def close(self) -> None:
        """See `Session`."""
        if self._closed:
            return
        self._closed = True
        if self._fixed and self._usable:
            leave_room(self._loaded, self._room)
        else:
            self._room.steps.forget()
            self._cache.clear()
        self._lanes.clear()
        self._known.clear()
        self._unread = None

    @contextmanager
    def _work(self, *, after_the_caller: bool = False) -> Iterator[None]:
        """On CUDA members work side by side, each on a stream of its own."""
        stream = self._room.stream
        if after_the_caller and stream is not None:  # what the work reads of the caller's is done by then
            stream.wait_stream(torch.cuda.current_stream(self._loaded.device))
        with torch.inference_mode(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            yield

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """`_work` that the caller's stream waits for."""
        with self._work():
            yield
        if self._room.stream is not None:
            torch.cuda.current_stream(self._loaded.device).wait_stream(self._room.stream)

    def _answer(self, logits: torch.Tensor, k: int) -> HFAnswer:
        said = Distribution(self._loaded.name, self._loaded.vocab_size, k, logits)
        return HFAnswer(said, self._room.stream)

    def _take_unread(self) -> None:
        """The lanes hold what was written last, now that the host can read it."""
        unread, self._unread = self._unread, None
        if unread is not None:
            for lane, (ids, known) in unread.read().items():
                self._lanes.ids[lane].extend(ids)
                self._known[lane] = known

    def _roll_back(
        self, wanted: Mapping[int, list[int]], positions: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """Keep of each lane what it shares with these ids; the lanes that are to be fed."""
        unfed = dict(wanted)
        for lane, ids in wanted.items():
            held = self._lanes.ids[lane]
            keep = common_prefix(held, ids)
            known = self._known.get(lane)
            if keep == len(ids) == len(held) and known is not None and known.valid >= positions[lane]:
                del unfed[lane]
                continue
            # The logits after a strict prefix are not kept: its last tokens go through the model once more.
            # Until that is done the lane holds the kept prefix only: an interrupt leaves it usable.
            self._known.pop(lane, None)
            del held[min(keep, len(ids) - positions[lane]) :]
        return unfed

    def _joined(self, positions: Mapping[int, int]) -> torch.Tensor:
        """The last logits of lanes; of one lane, or where they are a forward's whole output, no copy."""
        found = [self._known[lane] for lane in positions]
        rows = [one.last(count) for one, count in zip(found, positions.values(), strict=True)]
        if len(rows) == 1:
            return rows[0]
        whole = found[0].logits
        if len(whole) == len(found) and all(
            one.logits is whole and one.at == i and len(own) == whole.shape[1]
            for i, (one, own) in enumerate(zip(found, rows, strict=True))
        ):
            return whole.flatten(0, 1)
        return torch.cat(rows)

    def _let_go(self, fed: Collection[int]) -> None:
        """Logits of lanes that are not fed now are kept, but not a whole batch's for the sake of a few."""
        for lane, known in list(self._known.items()):
            if fed and lane not in fed and len(known.logits) > 1:
                self._known[lane] = Known(known.last(known.valid)[None].clone(), 0, known.valid)

    def _check(self, lane: int, ids: list[int]) -> None:
        self._lanes.check(lane)
        check_ids(self._loaded, lane, self._lanes.count, ids)


def _on_fixed_buffers(loaded: LoadedModel, cache: LaneCache) -> bool:
    """Whether short pieces go over fixed buffers: on one CUDA device, where the model can."""
    try:
        check_batches(loaded, cache.windows)
    except ModelError:
        if cache.lanes > 1:
            raise
        return False
    if steady_positions(inner_model(loaded.model).config.get_text_config()) is not None:
        return False  # such a model asks the device for the largest position, which no captured step can
    return loaded.device.type == "cuda" and not is_spread(loaded.model)
