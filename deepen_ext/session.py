"""Several sequences through one member: only what is new of each goes through the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from deepen_ext.errors import InputError, ModelError
from deepen_ext.kv_cache import CHUNK, LaneCache, ManyLanes, OneLane
from deepen_ext.member import Member
from deepen_ext.memory import available_bytes, estimate_bytes

__all__ = ["BatchSession", "available_bytes", "estimate_bytes"]

# What a forward costs beside its tokens (its weights are read once), in tokens.
_FORWARD_COST = {"cpu": 8, "cuda": 128}


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
        if rows < 1:
            raise InputError(f"{member.name}: a session of {rows} rows; make it 1 or more")
        self.member = member
        self.rows = rows
        self.tokens_fed = 0
        self._capacity = capacity
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._order = list(range(rows))  # the rows not released; a row's place is its lane in the cache
        # Logits after a row's ids: a forward's output [b, V] and the row's place in it.
        self._logits: dict[int, tuple[torch.Tensor, int]] = {}
        self._cache = LaneCache(member, rows)
        if rows > 1:
            check_batches(member, self._cache.windows)

    def __enter__(self) -> BatchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ids(self, row: int) -> list[int]:
        """Token ids that the row's cache holds."""
        self._check_row(row)
        return list(self._ids[row])

    def sync(self, targets: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """Bring rows to these ids and return the logits ``[len(targets), V]`` of the token after each.

        Of each row the prefix shared with its present ids is kept, its cache rolled back to it, and the rest
        fed; rows with about as much to feed go through the model together. A row that holds its ids already
        costs nothing if its logits are known, else one token. Rows not named stay as they are. The logits
        are in the mapping's order, the model's dtype and on its device; they are an inference tensor: read
        them, or clone before writing.

        After any exception the session can go on: a row then holds what is surely in its cache.

        Raises:
            InputError: no ids, an id outside the vocabulary, more ids than the member's context holds, or a
                row that does not exist or was released.
        """
        wanted = {row: list(ids) for row, ids in targets.items()}
        for row, ids in wanted.items():
            self._check_row(row)
            self._check_ids(row, ids)
        if not wanted:
            member = self.member
            return torch.empty((0, member.vocab_size), dtype=member.dtype, device=member.device)
        new = {}
        for row, ids in wanted.items():
            keep = _common_prefix(self._ids[row], ids)
            if keep == len(ids) == len(self._ids[row]) and row in self._logits:
                continue
            # The logits after a strict prefix are not kept: its last token goes through the model once more.
            # Until that is done the row holds the kept prefix only: an interrupt leaves it usable.
            self._logits.pop(row, None)
            del self._ids[row][min(keep, len(ids) - 1) :]
            new[row] = ids[len(self._ids[row]) :]
        with torch.inference_mode():
            self._let_go(new)
            longest = max(len(ids) for ids in wanted.values())
            self._cache.reserve(longest)
            for group in _groups({row: len(ids) for row, ids in new.items()}, self.member.device.type):
                if len(group) == 1:
                    self._feed_one(group[0], new[group[0]])
                else:
                    self._feed_many({row: new[row] for row in group})
            return self._joined(list(wanted))

    def release(self, row: int) -> None:
        """Let a finished row go: its room is freed, and it is not fed any more."""
        self._check_row(row)
        lane = self._order.index(row)
        # Lanes in use stay side by side, so that a forward reads them without copies.
        moved = {other: self._ids[other] for other in self._order[lane + 1 :]}
        for other in (row, *moved):
            self._ids[other] = []
        self._logits.pop(row, None)
        with torch.inference_mode():
            self._cache.close_gap(lane, len(self._order))
        self._order.remove(row)
        for other, ids in moved.items():
            self._ids[other] = ids

    def close(self) -> None:
        """Release all rows and free the cache. A second call does nothing."""
        self._order.clear()
        self._logits.clear()
        self._cache.clear()

    def _feed_one(self, row: int, new: list[int]) -> None:
        """One row by itself: its lane is read as it lies, and no mask is needed."""
        held = self._ids[row]
        lane = self._order.index(row)
        for at in range(0, len(new), CHUNK):
            piece = new[at : at + CHUNK]
            fed = torch.tensor([piece], device=self.member.device)
            logits = self._forward(OneLane(lane, len(held)), input_ids=fed)
            held.extend(piece)
            self.tokens_fed += len(piece)
        self._logits[row] = logits, 0

    def _feed_many(self, new: dict[int, list[int]]) -> None:
        """Rows of different lengths in one forward, padded on the left.

        So that each row's last token is the last of its line. Padding repeats the row's first new token: it
        attends to what that one attends to, and its states go to the slot that nothing ever reads.
        """
        lanes = sorted(self._order.index(row) for row in new)
        whole = range(lanes[0], lanes[-1] + 1)
        if len(whole) <= 2 * len(lanes):
            # Some rows in between are run for nothing, which is cheaper than a copy of all others' states.
            lanes = list(whole)
        rows = [self._order[lane] for lane in lanes]
        width = max(map(len, new.values()))
        lowest = min(len(self._ids[row]) for row in new)
        filler = next(iter(new.values()))[0]
        unread = self._cache.slots - 1
        tokens, positions, slots = [], [], []
        for row in rows:
            ids = new.get(row, [])
            start = len(self._ids[row]) if ids else lowest
            padding = width - len(ids)
            following = list(range(start, start + len(ids)))
            tokens.append([ids[0] if ids else filler] * padding + ids)
            positions.append([start] * padding + following)
            slots.append([unread] * padding + following)
        packed = torch.tensor([tokens, positions, slots], device=self.member.device)
        index = torch.tensor(lanes, device=self.member.device)
        feed = ManyLanes(
            lanes=slice(lanes[0], lanes[-1] + 1) if len(lanes) == len(whole) else index,
            lane_index=index[:, None],
            slots=packed[2],
            first={w: 0 if w is None else max(lowest - w + 1, 0) for w in self._cache.windows},
            end=max(line[-1] for line in positions) + 1,
        )
        mask = attention_mask(packed[1], feed, self.member.dtype)
        logits = self._forward(feed, input_ids=packed[0], position_ids=packed[1], attention_mask=mask)
        for place, row in enumerate(rows):
            if row in new:
                self._ids[row].extend(new[row])
                self.tokens_fed += len(new[row])
                self._logits[row] = logits, place

    def _forward(self, feed: OneLane | ManyLanes, **inputs: Any) -> torch.Tensor:
        output = self.member.model(
            past_key_values=self._cache.at(feed), use_cache=True, logits_to_keep=1, **inputs
        )
        logits: torch.Tensor = output.logits[:, -1, :]
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

    def _let_go(self, fed: Mapping[int, object]) -> None:
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


def check_batches(member: Member, windows: Sequence[int | None]) -> None:
    """Raise ModelError unless the model can run sequences of different lengths in one forward, each exactly.

    They need positions and masks of their own. ``windows`` are those of the model's layers.
    """
    config = member.model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    types = getattr(config, "layer_types", None) or []
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = rope.values() if rope and all(isinstance(part, dict) for part in rope.values()) else [rope]
    changing = {part.get("rope_type") for part in ropes} & {"dynamic", "longrope"}
    if "position_ids" not in inspect.signature(member.model.forward).parameters or getattr(
        config, "alibi", False
    ):
        reason = "takes no position_ids"
    elif attention not in ("sdpa", "eager"):
        reason = f"has attention '{attention}'; load it with attn_implementation='sdpa'"
    elif "chunked_attention" in types:
        reason = "has chunked attention"
    elif changing:
        reason = f"has rotary positions of type '{changing.pop()}', which depend on the longest sequence"
    elif len(windows) > 1 and not _takes_a_mask_by_layer_type(member):
        reason = "has layers with different windows but takes one mask for all"
    else:
        return
    raise ModelError(
        f"{member.name}: this model ({type(member.model).__name__}) cannot run texts of different lengths "
        f"together: it {reason}. Generate one prompt at a time"
    )


def _takes_a_mask_by_layer_type(member: Member) -> bool:
    """Whether the model takes masks prepared by the caller, one for each layer type (most models do)."""
    source = inspect.getsource(inspect.unwrap(type(member.model.base_model).forward))
    return re.search(r"isinstance\(.*attention_mask, dict\)", source) is not None


def attention_mask(
    positions: torch.Tensor, feed: ManyLanes, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Which slots each query sees: those up to its position, within its layer's window.

    Additive, ``[b, 1, W, slots]``, as every attention of transformers takes it; where layers have different
    windows, one for each layer type. ``positions`` is int64 ``[b, W]``.
    """
    masks = {}
    for window, first in feed.first.items():
        slots = torch.arange(first, feed.end, device=positions.device)
        hidden = slots > positions[:, :, None]
        if window is not None:
            hidden |= slots <= positions[:, :, None] - window
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        masks[window] = zeros.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {
        "full_attention" if window is None else "sliding_attention": mask for window, mask in masks.items()
    }


def _groups(new: Mapping[int, int], device: str) -> list[list[int]]:
    """Which rows to feed together, by how many tokens they have to feed.

    A forward of b rows costs its fixed part and b times its widest row; the rows are cut, sorted by width,
    where the sum is smallest. What is longer than a chunk goes by itself.
    """
    fixed = _FORWARD_COST.get(device, 128)
    if len(set(new.values())) == 1 and sum(new.values()) <= CHUNK:
        return [list(new)]
    rows = sorted(new, key=lambda row: new[row])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n rows: cost, and where the last group begins
    for n in range(1, len(rows) + 1):
        width = new[rows[n - 1]]
        best.append(
            min(
                (best[begin][0] + fixed + (n - begin) * width, begin)
                for begin in range(n)
                if (n - begin) * width <= CHUNK or begin == n - 1
            )
        )
    groups = []
    end = len(rows)
    while end:
        begin = best[end][1]
        groups.append(sorted(rows[begin:end]))
        end = begin
    return groups[::-1]


def _common_prefix(left: list[int], right: list[int]) -> int:
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # the usual case, at the speed of C
        return shorter
    return next(i for i in range(shorter) if left[i] != right[i])
