"""Several texts through one llama.cpp model: only what is new of each goes through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from deepen_ext.errors import InputError, ModelError, failures_of
from deepen_ext.ground.closing import Closing
from deepen_ext.members.asking import (
    check_ids,
    check_lane,
    check_positions,
    check_start,
    common_prefix,
    lane_count,
    read_end,
)
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.llama_cpp.answer import LlamaAnswer
from deepen_ext.members.llama_cpp.context import MOST_SEQUENCES, MOST_TOKENS, Context, Feed
from deepen_ext.members.llama_cpp.loaded_gguf import LoadedGguf

READ_BLOCK = 128  # positions of a block of logits (see `read_end`): 134 MB for 262,144 tokens in float32
# Tokens that a lane must be spared before it waits for another one to be fed. Waiting costs one more forward,
# about five tokens. And the few tokens of a step must not be taken apart because two texts go the same way.
_SHARED = 16


class LlamaSession(Closing):
    """See `members.backend.Session`. A lane is a sequence of llama.cpp, a step of all lanes one forward pass.

    The logits that `ask` gives lie in llama.cpp's own buffer: they hold until the session is asked again.
    """

    def __init__(self, loaded: LoadedGguf, lanes: int = 1, *, capacity: int = 0) -> None:
        """Nothing is allocated before the first `ask`.

        Args:
            loaded: the model; its sessions do not meet.
            lanes: number of texts.
            capacity: expected tokens of a text. More may come.

        Raises:
            ModelError: more lanes than llama.cpp has sequences.
        """
        self._loaded = loaded
        self._count = lane_count(loaded.name, lanes)
        if lanes > MOST_SEQUENCES:
            raise ModelError(
                f"{loaded.name}: llama.cpp runs at most {MOST_SEQUENCES} texts at once, and {lanes} are "
                f"asked for; give batch_size={MOST_SEQUENCES} or less"
            )
        self._capacity = capacity
        self._ids: dict[int, list[int]] = {lane: [] for lane in range(self._count)}  # but for released lanes
        self._known: dict[int, torch.Tensor] = {}  # logits [positions, V] after a lane's last ids
        self._views: set[int] = set()  # lanes whose known logits lie in the context's buffer
        self._context: Context | None = None

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """See `Session`."""
        cells = 0 if self._context is None else self._context.cells
        return {self._loaded.device: self._loaded.cache_bytes(cells)}

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> LlamaAnswer:
        """See `Session`. The work is done when this returns."""
        loaded = self._loaded
        wanted = {lane: list(ids) for lane, ids in targets.items()}
        for lane, ids in wanted.items():
            self._check(lane, ids)
        counts = check_positions(loaded.name, wanted, positions)
        if not wanted:
            return self._answer(torch.empty((0, loaded.vocab_size), dtype=torch.float32, device="cpu"), k)
        unfed = {lane: ids for lane, ids in wanted.items() if not self._knows(lane, ids, counts[lane])}
        if unfed:
            for lane, ids in unfed.items():
                # The last ids go through the model in any case, for their logits.
                self._drop_from(lane, min(common_prefix(self._ids[lane], ids), len(ids) - counts[lane]))
            with failures_of(loaded.name):
                self._make_room(wanted, sum(counts[lane] for lane in unfed))
            self._share_prefixes(unfed, counts)
            first = self._fed_first(unfed, counts)
            logits = self._feed(first, counts)
            if len(first) < len(unfed):
                later = {lane: ids for lane, ids in unfed.items() if lane not in first}
                self._share_prefixes(later, counts)
                self._feed(later, counts)
            elif len(unfed) == len(wanted) and logits is not None:
                return self._answer(logits, k)
        return self._answer(torch.cat([self._known[lane][-count:] for lane, count in counts.items()]), k)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """See `Session`; of the lane's present ids at most ``ids[:start]`` is kept."""
        wanted = list(ids)
        self._check(lane, wanted)
        check_start(self._loaded.name, wanted, start)
        return self._read(lane, wanted, start, k)

    def _read(self, lane: int, ids: list[int], start: int, k: int) -> Iterator[Distribution]:
        self._drop_from(lane, min(common_prefix(self._ids[lane], ids), start))
        at = len(self._ids[lane])
        while at < len(ids):
            self._check(lane, ids)
            if self._ids[lane] != ids[:at]:
                raise InputError(
                    f"{self._loaded.name}: lane {lane} was given other ids while it was read; read it to "
                    "its end"
                )
            end = read_end(at, start, len(ids), MOST_TOKENS, READ_BLOCK)
            outputs = end - at if at >= start else 0
            self._known.pop(lane, None)
            self._make_room({lane: ids}, outputs)
            logits = self._forward([Feed(lane, at, ids[at:end], outputs)])
            if at >= start:
                self._known[lane] = logits[-1:].clone()
                yield Distribution(self._loaded.name, self._loaded.vocab_size, k, logits.clone())
            at = end

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """See `Session`. Only what is asked for goes through the model in any case."""
        check_lane(self._loaded.name, lane, self._count, self._ids)
        if forget:
            self._drop_from(lane, 0)

    def release(self, lane: int) -> None:
        """See `Session`."""
        check_lane(self._loaded.name, lane, self._count, self._ids)
        self._known.pop(lane, None)
        if self._context is not None and self._ids[lane]:
            self._context.remove(lane, 0)
        del self._ids[lane]

    def close(self) -> None:
        """See `Session`."""
        self._ids.clear()
        self._known.clear()
        if self._context is not None:
            self._context.close()
            self._context = None

    def _check(self, lane: int, ids: list[int]) -> None:
        check_lane(self._loaded.name, lane, self._count, self._ids)
        check_ids(self._loaded, lane, self._count, ids)

    def _answer(self, logits: torch.Tensor, k: int) -> LlamaAnswer:
        return LlamaAnswer(Distribution(self._loaded.name, self._loaded.vocab_size, k, logits))

    def _knows(self, lane: int, ids: list[int], positions: int) -> bool:
        known = self._known.get(lane)
        return known is not None and len(known) >= positions and self._ids[lane] == ids

    def _drop_from(self, lane: int, length: int) -> None:
        """The lane holds its first ids alone, or none where the model's states cannot be cut."""
        self._known.pop(lane, None)
        held = self._ids[lane]
        if len(held) > length:
            assert self._context is not None
            del held[length:]
            if not self._context.remove(lane, length):
                held.clear()
                self._context.remove(lane, 0)

    def _make_room(self, wanted: Mapping[int, Sequence[int]], rows: int) -> None:
        """A cache that has room for these texts beside the others, and an output buffer for so many rows.

        A cache that is too small is replaced by a larger one, to which the lanes' states are moved; so is one
        whose buffer would have to grow while somebody still looks at it. Lanes that no text has used have no
        room in it: fresh memory can take seconds a gigabyte, and no text goes on meanwhile. With more lanes,
        each gets the room that texts need now, not what a longer one needed once: `bytes_needed` counts so.
        """
        self._keep_known()
        old = self._context
        lengths = {lane: len(wanted.get(lane, ids)) for lane, ids in self._ids.items()}
        lengths = {lane: length for lane, length in lengths.items() if length}
        sequences, cells = self._needed(lengths)
        if old is not None and sequences <= old.sequences and cells <= old.room and not old.must_move(rows):
            return
        expected = {lane: max(length, self._capacity) for lane, length in lengths.items()}
        sequences, cells = self._needed(expected)
        if old is not None:
            cells = cells if sequences > old.sequences else self._grown(old.room, cells)
        self._context = self._loaded.new_context(sequences, cells)
        if old is None:
            return
        for lane, ids in self._ids.items():
            if ids and not self._context.take_over(old, lane):
                ids.clear()  # they are read again
                self._context.remove(lane, 0)
        old.close()

    def _needed(self, lengths: Mapping[int, int]) -> tuple[int, int]:
        """Sequences for lanes of these lengths, and how many cells `Context.room` must have."""
        if not self._loaded.own_cells:
            return self._count, sum(lengths.values())
        # Of the lanes that are free the first are used first.
        return min(self._count, 1 << max(lengths).bit_length()), max(lengths.values())

    def _grown(self, room: int, needed: int) -> int:
        """The next size of a cache: twice the last one, as far as texts can be so long."""
        if needed <= room:
            return room
        longest = self._loaded.context_length
        if longest is None:
            return max(needed, 2 * room)
        return max(needed, min(2 * room, longest * (1 if self._loaded.own_cells else self._count)))

    def _keep_known(self) -> None:
        """Copies of the logits that the next forward would overwrite."""
        for lane in self._views & self._known.keys():
            self._known[lane] = self._known[lane].clone()
        self._views.clear()

    def _fed_first(
        self, unfed: Mapping[int, list[int]], positions: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """The lanes to feed now. The others wait, to take over what they share with one of these."""
        if len(unfed) == 1 or not self._loaded.shares:
            return dict(unfed)
        first: dict[int, list[int]] = {}
        for lane, ids in sorted(unfed.items(), key=lambda one: -len(one[1])):
            held, most = len(self._ids[lane]), len(ids) - positions[lane]
            spared = 0
            if most - held >= _SHARED:
                shared = (common_prefix(ids, other) for other in first.values())
                spared = min(max(shared, default=0), most) - held
            if spared < _SHARED:
                first[lane] = ids
        return {lane: ids for lane, ids in unfed.items() if lane in first}

    def _share_prefixes(self, unfed: Mapping[int, list[int]], positions: Mapping[int, int]) -> None:
        """What another lane holds of a lane's ids need not be fed: the lane takes over its cells.

        Even for one token: the copy takes no forward apart and costs no more than the token. One token spared
        saves 9 to 13 ms of CPU time for SmolLM2, and none for Gemma, whose cells are really copied; two
        tokens save Gemma 8 to 11 ms (the embedded files, contexts of 256 and 1,000).
        """
        if self._count == 1 or not self._loaded.shares:
            return
        context = self._context
        assert context is not None
        for lane, ids in unfed.items():
            held, most = self._ids[lane], len(ids) - positions[lane]
            if len(held) >= most:
                continue
            common = {other: common_prefix(own, ids) for other, own in self._ids.items() if other != lane}
            source = max(common, key=lambda other: common[other], default=lane)
            if (end := min(common.get(source, 0), most)) > len(held):
                self._drop_from(lane, 0)
                if context.copy(source, lane, end):
                    held.extend(ids[:end])
                else:
                    context.remove(lane, 0)

    def _feed(self, wanted: Mapping[int, list[int]], positions: Mapping[int, int]) -> torch.Tensor | None:
        """Feed the lanes what they lack. Where one forward does, its logits, lane after lane."""
        pieces = [
            Feed(lane, at, piece, max(0, at + len(piece) - max(at, len(ids) - positions[lane])))
            for lane, ids in wanted.items()
            for at in range(len(self._ids[lane]), len(ids), MOST_TOKENS)
            for piece in [ids[at : at + MOST_TOKENS]]
        ]
        forwards: list[list[Feed]] = [[]]
        left = MOST_TOKENS
        for piece in pieces:
            if len(piece.ids) > left:
                forwards.append([])
                left = MOST_TOKENS
            forwards[-1].append(piece)
            left -= len(piece.ids)
        for feeds in forwards:
            self._keep_known()
            logits = self._forward(feeds)
            at = 0
            for feed in feeds:
                if feed.outputs:
                    own = logits[at : at + feed.outputs]
                    before = self._known.get(feed.sequence)
                    self._known[feed.sequence] = own if before is None else torch.cat([before, own])
                    self._views.add(feed.sequence)
                    at += feed.outputs
        return logits if len(forwards) == 1 else None

    def _forward(self, feeds: list[Feed]) -> torch.Tensor:
        """One forward. Should it fail, the lanes hold what they held before."""
        context = self._context
        assert context is not None
        try:
            logits = context.decode(feeds)
        except BaseException:  # an interrupt too: nobody knows what was written
            for feed in feeds:
                if not context.remove(feed.sequence, feed.start):
                    self._ids[feed.sequence].clear()
                    context.remove(feed.sequence, 0)
            raise
        for feed in feeds:
            self._ids[feed.sequence].extend(feed.ids)
        return logits
