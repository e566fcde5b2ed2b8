"""Several sequences through one member: only what is new of each goes through the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.numbers import whole_number
from deepen_ext.members.hf.attention import share_heads, states_in_common
from deepen_ext.members.hf.feed_plan import SHARED, common_prefix, fed_first, groups, in_common
from deepen_ext.members.hf.graphs import WIDTHS, leave_room, take_room
from deepen_ext.members.hf.kv_cache import CHUNK, LaneCache, ManyLanes, OneLane
from deepen_ext.members.hf.masks import attention_mask, check_batches
from deepen_ext.members.hf.small_products import small_products
from deepen_ext.members.member import Member, inner_model

READ_BLOCK = 128  # most positions of one block of logits: 134 MB for a vocabulary of 262,144 in float32


class BatchSession:
    """Several sequences ("rows") through one member, each with a KV cache that rolls back exactly.

    ``tokens_fed`` is the number of tokens that ever went through the model, over all rows.
    """

    def __init__(self, member: Member, rows: int = 1, *, capacity: int = 0) -> None:
        """Nothing is allocated before the first `sync`.

        Args:
            member: whose model is run; sessions of one member do not meet.
            rows: number of sequences.
            capacity: expected tokens of a row. More may come.

        Raises:
            ModelError: the model's cache cannot be rolled back by tokens, or with two or more rows, the model
                cannot run sequences of different lengths in one forward.
        """
        rows = whole_number(f"{member.name}: a session's number of rows", rows, 1)
        self.member = member
        self.rows = rows
        self.tokens_fed = 0
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._order = list(range(rows))  # the rows not released; a row's place is its lane in the cache
        self._aside: set[int] = set()  # of these, rows that nobody feeds for now
        # Logits after a row's ids: a forward's output [b, V] and the row's place in it.
        self._logits: dict[int, tuple[torch.Tensor, int]] = {}
        share_heads(inner_model(member.model))
        self._room = take_room(member, rows, capacity)
        self._cache = self._room.cache
        self._fixed = _on_fixed_buffers(member, self._cache)
        self._capacity = capacity if self._fixed else 0
        self._usable = True
        self._closed = False  # not the same as all rows released, which is how a generation ends
        if self._room.stream is not None:  # for the weights, should they still be on their way
            self._room.stream.wait_stream(torch.cuda.current_stream(member.device))
        with self._on_own_stream():
            self._cache.zero()

    def __enter__(self) -> BatchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cache_bytes(self) -> int:
        """Bytes of its cache, as far as it was allocated."""
        return self._cache.nbytes

    def ids(self, row: int) -> list[int]:
        """Token ids that the row's cache holds."""
        self._check_row(row)
        return list(self._ids[row])

    def sync(self, targets: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """Bring rows to these ids and return the logits ``[len(targets), V]`` of the token after each.

        Of each row the prefix shared with its present ids is kept, its cache rolled back to it, and the rest
        fed; rows with about as much to feed go through the model together. A row that holds its ids already
        costs nothing if its logits are known, else one token. A longer prefix that another row holds is
        copied from there, and one that several of these rows begin with is fed once (see `feed_plan`). Rows
        not named stay as they are. The logits are in the mapping's order, the model's dtype and on its
        device; they are an inference tensor: read them, or clone before writing.

        After any exception the session can go on: a row then holds what is surely in its cache.

        Raises:
            InputError: no ids, an id outside the vocabulary, more ids than the member's context holds, or a
                row that does not exist or was released.
        """
        wanted = {row: list(ids) for row, ids in targets.items()}
        for row, ids in wanted.items():
            self._check_row(row)
            self._check_ids(row, ids)
        self._aside.difference_update(wanted)
        if not wanted:
            member = self.member
            return torch.empty((0, member.vocab_size), dtype=member.dtype, device=member.device)
        unfed = dict(wanted)
        for row, ids in wanted.items():
            keep = common_prefix(self._ids[row], ids)
            if keep == len(ids) == len(self._ids[row]) and row in self._logits:
                del unfed[row]
                continue
            # The logits after a strict prefix are not kept: its last token goes through the model once more.
            # Until that is done the row holds the kept prefix only: an interrupt leaves it usable.
            self._logits.pop(row, None)
            del self._ids[row][min(keep, len(ids) - 1) :]
        self._usable = False  # for another session, should this fail
        with self._on_own_stream():
            self._let_go(unfed)
            self._cache.reserve(max(*map(len, wanted.values()), self._capacity))
            while unfed:
                self._copy_prefixes(unfed)
                held = {row: len(self._ids[row]) for row in unfed}
                now = fed_first(unfed, held, self.member.device.type)
                self._feed({row: unfed.pop(row)[held[row] :] for row in now})
            logits = self._joined(list(wanted))
        if self._room.stream is not None:
            logits.record_stream(torch.cuda.current_stream(self.member.device))
        self._usable = True
        return logits

    def read(self, row: int, ids: Sequence[int], start: int = 0) -> Iterator[torch.Tensor]:
        """Bring a row to these ids, giving the logits ``[n, V]`` after ``ids[start]`` and every later id.

        They come in blocks, in the order of the ids, in the model's dtype and on its device, as inference
        tensors; each is the caller's to keep. Of the prefix shared with the row's present ids at most
        ``ids[:start]`` is kept. Dropped half way, or after any exception, the row holds what was fed so far.

        Raises:
            InputError: see `sync`; a start that is no place in the ids; when the next block is asked for:
                the row has been given other ids since the last one.
        """
        wanted = list(ids)
        self._check_row(row)
        self._check_ids(row, wanted)
        if not 0 <= start < len(wanted):
            raise InputError(
                f"{self.member.name}: cannot read from place {start} of {len(wanted)} ids; "
                f"choose 0 to {len(wanted) - 1}"
            )
        return self._read(row, wanted, start)

    def _read(self, row: int, ids: list[int], start: int) -> Iterator[torch.Tensor]:
        at = min(common_prefix(self._ids[row], ids), start)
        self._logits.pop(row, None)
        del self._ids[row][at:]
        while at < len(ids):
            self._check_row(row)
            if self._ids[row] != ids[:at]:
                raise InputError(
                    f"{self.member.name}: row {row} was given other ids while it was read; read it to its end"
                )
            end = min(at + (CHUNK if at < start else READ_BLOCK), start if at < start else len(ids))
            self._usable = False
            with self._on_own_stream():
                self._cache.reserve(max(len(ids), self._capacity))
                fed = self._on_host([ids[at:end]]).to(self.member.device, non_blocking=True)
                feed = OneLane(self._order.index(row), at)
                wanted = end - at if at >= start else 1
                logits = self._run(feed, input_ids=fed, logits_to_keep=wanted)[0]
                self._ids[row].extend(ids[at:end])
                self.tokens_fed += end - at
                self._logits[row] = logits[-1:].clone(), 0  # a view would keep the whole block
            if self._room.stream is not None:
                logits.record_stream(torch.cuda.current_stream(self.member.device))
            self._usable = True
            if at >= start:
                yield logits
            at = end

    def release(self, row: int) -> None:
        """Let a finished row go: its room is freed, and it is not fed any more."""
        self._check_row(row)
        lane = self._order.index(row)
        # Lanes in use stay side by side, so that a forward reads them without copies.
        self._ids[row] = []
        self._logits.pop(row, None)
        with self._moving(self._order[lane + 1 :]):
            self._cache.close_gap(lane, len(self._order))
            self._order.remove(row)

    def set_aside(self, row: int) -> None:
        """Keep a row that is not fed for a while out of the way. It holds its ids; any `sync` may name it.

        On the CPU its lane changes places with the last one in use: those stay side by side.
        """
        self._check_row(row)
        self._aside.add(row)
        in_use = [other for other in self._order if other not in self._aside]
        if not in_use or self._fixed:  # over fixed buffers all lanes are run at every step
            return
        lane, last = self._order.index(row), self._order.index(in_use[-1])
        if lane > last:
            return
        end = max(len(self._ids[row]), len(self._ids[in_use[-1]]))
        with self._moving([row, in_use[-1]]):
            self._cache.exchange(lane, last, end)
            self._order[lane], self._order[last] = self._order[last], self._order[lane]

    def close(self) -> None:
        """Release all rows and free the cache. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._fixed and self._usable:
            leave_room(self.member, self._room)
        else:
            self._room.steps.forget()
            self._cache.clear()
        self._order.clear()
        self._logits.clear()

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """On CUDA members work side by side: the caller's stream waits for this one, not the other way."""
        stream = self._room.stream
        with torch.inference_mode(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            yield
        if stream is not None:
            torch.cuda.current_stream(self.member.device).wait_stream(stream)

    @contextmanager
    def _moving(self, rows: Sequence[int]) -> Iterator[None]:
        """These rows' lanes move here; should that be interrupted, they hold nothing."""
        held = {row: self._ids[row] for row in rows}
        for row in held:
            self._ids[row] = []
        with self._on_own_stream():
            yield
        for row, ids in held.items():
            self._ids[row] = ids

    def _copy_prefixes(self, wanted: Mapping[int, list[int]]) -> None:
        """What another row holds of a row's ids need not be fed: the row takes its states."""
        for row, ids in wanted.items():
            start = len(self._ids[row])
            if len(ids) - 1 - start < SHARED:  # the last token is fed in any case, for its logits
                continue
            common = {other: common_prefix(self._ids[other], ids) for other in self._order}
            source = max(common, key=lambda other: common[other])
            end = min(common[source], len(ids) - 1)
            if end - start >= SHARED:
                self._cache.copy_prefix(self._order.index(source), self._order.index(row), start, end)
                self._ids[row].extend(ids[start:end])

    def _feed(self, new: dict[int, list[int]]) -> None:
        waiting = {row: len(ids) for row, ids in new.items()}
        if self._fixed and (short := [row for row in new if len(new[row]) <= WIDTHS[-1]]):
            self._feed_fixed({row: new[row] for row in short})
            waiting = {row: count for row, count in waiting.items() if row not in short}
        for group in groups(waiting, self.member.device.type):
            if len(group) == 1:
                self._feed_one(group[0], new[group[0]])
            else:
                self._feed_many({row: new[row] for row in group})

    def _feed_one(self, row: int, new: list[int]) -> None:
        """One row by itself: its lane is read as it lies, and no mask is needed."""
        held = self._ids[row]
        lane = self._order.index(row)
        for at in range(0, len(new), CHUNK):
            piece = new[at : at + CHUNK]
            fed = self._on_host([piece]).to(self.member.device, non_blocking=True)
            logits = self._forward(OneLane(lane, len(held)), input_ids=fed, logits_to_keep=1)
            held.extend(piece)
            self.tokens_fed += len(piece)
        self._logits[row] = logits, 0

    def _feed_many(self, new: dict[int, list[int]]) -> None:
        """Rows of different lengths in one forward."""
        lanes = sorted(self._order.index(row) for row in new)
        whole = range(lanes[0], lanes[-1] + 1)
        if len(whole) <= 2 * len(lanes):
            # Some rows in between are run for nothing, which is cheaper than a copy of all others' states.
            lanes = list(whole)
        lines = self._lines(new, lanes, width=max(map(len, new.values())))
        ends = [line[-1] + 1 for line in lines[1]]
        lowest = min(len(self._ids[row]) for row in new)
        inputs = self._on_host(lines).to(self.member.device, non_blocking=True)
        index = self._on_host(lanes).to(self.member.device, non_blocking=True)
        feed = ManyLanes(
            lanes=slice(lanes[0], lanes[-1] + 1) if len(lanes) == len(whole) else index,
            lane_index=index[:, None],
            slots=inputs[2],
            first={w: 0 if w is None else max(lowest - w + 1, 0) for w in self._cache.windows},
            end=max(ends),
        )
        on_cpu = self.member.device.type == "cpu"
        with states_in_common(in_common([self._ids[row] for row in new]) if on_cpu else 0, feed.end):
            self._fed(new, lanes, self._masked(feed, inputs))

    def _feed_fixed(self, new: dict[int, list[int]]) -> None:
        """Short pieces of any rows in one forward over all lanes, whose shape is one of a few."""
        width = next(width for width in WIDTHS if width >= max(map(len, new.values())))
        lanes = list(range(self.rows))
        lines = self._lines(new, lanes, width)
        end = max(line[-1] + 1 for line in lines[1])

        def forward(inputs: torch.Tensor, end: int) -> torch.Tensor:
            index = torch.arange(self.rows, device=inputs.device)[:, None]
            first = dict.fromkeys(self._cache.windows, 0)
            return self._masked(ManyLanes(slice(None), index, inputs[2], first, end), inputs)

        logits = self._room.steps.run(self._on_host(lines), end, self._cache.slots, forward)
        self._fed(new, lanes, logits.clone())  # the step's own are overwritten by the next

    def _lines(self, new: dict[int, list[int]], lanes: list[int], width: int) -> list[list[list[int]]]:
        """Ids, positions and slots ``[3][lanes][width]`` of a forward, padded on the left.

        So that each row's last token is the last of its line. Padding repeats the row's first new token: it
        attends to what that one attends to, and its states go to the slot that nothing ever reads. A lane
        whose row is not fed has padding only.
        """
        unread = self._cache.slots - 1
        lowest = min(len(self._ids[row]) for row in new)
        filler = next(iter(new.values()))[0]
        tokens, positions, slots = [], [], []
        for lane in lanes:
            row = self._order[lane] if lane < len(self._order) else -1
            ids = new.get(row, [])
            start = len(self._ids[row]) if ids else lowest
            padding = width - len(ids)
            following = list(range(start, start + len(ids)))
            tokens.append([ids[0] if ids else filler] * padding + ids)
            positions.append([start] * padding + following)
            slots.append([unread] * padding + following)
        return [tokens, positions, slots]

    def _fed(self, new: dict[int, list[int]], lanes: list[int], logits: torch.Tensor) -> None:
        """The forward over these lanes is done: the rows hold what they were fed."""
        places = {lane: place for place, lane in enumerate(lanes)}
        for row, ids in new.items():
            self._ids[row].extend(ids)
            self.tokens_fed += len(ids)
            self._logits[row] = logits, places[self._order.index(row)]

    def _on_host(self, values: list[Any]) -> torch.Tensor:
        """An int64 tensor, in memory from which it can be sent without waiting."""
        return torch.tensor(values, pin_memory=self.member.device.type == "cuda")

    def _masked(self, feed: ManyLanes, inputs: torch.Tensor) -> torch.Tensor:
        ids, positions, _ = inputs
        mask = attention_mask(positions, feed, self.member.dtype)
        # The last position as an index, not as the number 1: of a view with gaps, which that gives, the
        # product with the vocabulary is taken row by row (80 ms for SmolLM2, 500 for Gemma, measured).
        last = positions.new_full((1,), positions.shape[1] - 1)
        return self._forward(
            feed, input_ids=ids, position_ids=positions, attention_mask=mask, logits_to_keep=last
        )

    def _forward(self, feed: OneLane | ManyLanes, **inputs: Any) -> torch.Tensor:
        return self._run(feed, **inputs)[:, -1, :]

    def _run(self, feed: OneLane | ManyLanes, **inputs: Any) -> torch.Tensor:
        with small_products(self.member.device, self.member.dtype):
            output = self.member.model(past_key_values=self._cache.at(feed), use_cache=True, **inputs)
        logits: torch.Tensor = output.logits
        return logits

    def _joined(self, rows: list[int]) -> torch.Tensor:
        """Logits of these rows; where they are one forward's output as it is, no copy is made."""
        found = [self._logits[row] for row in rows]
        whole = found[0][0]
        if len(whole) == len(rows) and all(
            logits is whole and place == i for i, (logits, place) in enumerate(found)
        ):
            return whole
        return torch.stack([logits[place] for logits, place in found])

    def _let_go(self, fed: Collection[int]) -> None:
        """Logits of rows that are not fed now are kept, but not a whole batch's for the sake of a few."""
        for row, (logits, place) in list(self._logits.items()):
            if fed and row not in fed and len(logits) > 1:
                self._logits[row] = logits[place : place + 1].clone(), 0

    def _check_row(self, row: int) -> None:
        if row not in self._order:
            state = "was released" if 0 <= row < self.rows else f"is not one of 0..{self.rows - 1}"
            raise InputError(f"{self.member.name}: row {row} {state}")

    def _check_ids(self, row: int, ids: list[int]) -> None:
        member = self.member
        where = member.name if self.rows == 1 else f"{member.name}, row {row}"
        if not ids:
            raise InputError(
                f"{where}: nothing to feed; the text gives no tokens. Give a prompt that is not empty."
            )
        if member.context_length is not None and len(ids) > member.context_length:
            raise InputError(
                f"{where}: {len(ids)} tokens exceed its context of {member.context_length}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        if min(ids) < 0 or max(ids) >= member.vocab_size:
            raise InputError(
                f"{where}: token ids must lie in 0..{member.vocab_size - 1}, got {min(ids)}..{max(ids)}"
            )


def _on_fixed_buffers(member: Member, cache: LaneCache) -> bool:
    """Whether short pieces go over fixed buffers: on CUDA, where the model can."""
    try:
        check_batches(member, cache.windows)
    except ModelError:
        if cache.rows > 1:
            raise
        return False
    return member.device.type == "cuda"
