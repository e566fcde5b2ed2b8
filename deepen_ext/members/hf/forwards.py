"""New ids of some lanes through the model: one lane by itself, several in one forward, or a captured step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from deepen_ext.members.hf.attention import states_in_common
from deepen_ext.members.hf.feed_plan import groups, in_common
from deepen_ext.members.hf.fixed_steps import WIDTHS
from deepen_ext.members.hf.kv_cache import CHUNK, ManyLanes, OneLane
from deepen_ext.members.hf.lanes import Lanes
from deepen_ext.members.hf.loaded_model import LoadedModel
from deepen_ext.members.hf.masks import attention_mask
from deepen_ext.members.hf.placement import one_at_a_time
from deepen_ext.members.hf.rooms import Room
from deepen_ext.members.hf.small_products import small_products
from deepen_ext.ops.transfer import to_device


class Known(NamedTuple):
    """Logits after a lane's last ids, as they lie in a forward's output.

    Attributes:
        logits: the output [b, positions, V].
        at: where among the b the lane is.
        valid: how many of the last positions are the lane's; those before are of padding.
    """

    logits: torch.Tensor
    at: int
    valid: int

    def last(self, positions: int) -> torch.Tensor:
        """A view [positions, V] of the lane's last ones."""
        return self.logits[self.at, -positions:]


class Forwards:
    """Runs a model over the new ids of lanes, whose states it writes to the cache.

    A lane holds new ids (`Lanes.ids`) only when the forward that read them is done. `tokens_fed` counts the
    tokens that ever went through the model.
    """

    def __init__(self, loaded: LoadedModel, lanes: Lanes, room: Room, *, fixed: bool) -> None:
        """Nothing is run.

        Args:
            loaded: the model.
            lanes: of the session.
            room: the cache, and the captured steps.
            fixed: short pieces go over fixed buffers, so that they can be captured.
        """
        self.tokens_fed = 0
        self._loaded = loaded
        self._lanes = lanes
        self._cache = room.cache
        self._steps = room.steps
        self._fixed = fixed
        self._turn = one_at_a_time(loaded.model)

    def feed(self, new: dict[int, list[int]], positions: Mapping[int, int]) -> dict[int, Known]:
        """Feed each of these lanes its new ids, its `positions` or more, with what they cost least by.

        Lanes that are fed together all get the logits of as many positions as any of them wants.
        """
        known: dict[int, Known] = {}
        waiting = {lane: len(ids) for lane, ids in new.items()}
        if self._fixed and (short := [lane for lane in new if len(new[lane]) <= WIDTHS[-1]]):
            most = max(positions[lane] for lane in short)
            known |= self._feed_fixed({lane: new[lane] for lane in short}, most)
            waiting = {lane: count for lane, count in waiting.items() if lane not in known}
        for group in groups(waiting, self._loaded.device.type):
            most = max(positions[lane] for lane in group)
            if len(group) == 1:
                known |= self._feed_one(group[0], new[group[0]], most)
            else:
                known |= self._feed_many({lane: new[lane] for lane in group}, most)
        return known

    def run_lane(self, lane: int, piece: list[int], positions: int) -> torch.Tensor:
        """A piece of one lane, read as it lies and without a mask: logits [1, positions, V] after its end."""
        held = self._lanes.ids[lane]
        fed = self._on_host([piece]).to(self._loaded.device, non_blocking=True)
        feed = OneLane(self._lanes.cache_lane(lane), len(held), len(piece))
        logits = self._run(feed, input_ids=fed, logits_to_keep=self._last(len(piece), positions))
        held.extend(piece)
        self.tokens_fed += len(piece)
        return logits

    def _feed_one(self, lane: int, new: list[int], positions: int) -> dict[int, Known]:
        starts = range(0, len(new) - positions + 1, CHUNK)  # the last piece has all positions asked for
        for start in starts:
            end = len(new) if start == starts[-1] else start + CHUNK
            logits = self.run_lane(lane, new[start:end], positions if end == len(new) else 1)
        return {lane: Known(logits, 0, positions)}

    def _feed_many(self, new: dict[int, list[int]], positions: int) -> dict[int, Known]:
        """Lanes of different lengths in one forward."""
        own = self._lanes
        at = sorted(own.cache_lane(lane) for lane in new)
        whole = range(at[0], at[-1] + 1)
        if len(whole) <= 2 * len(at):
            # Some lanes in between are run for nothing, which is cheaper than a copy of all others' states.
            at = list(whole)
        lines = self._lines(new, at, width=max(map(len, new.values())))
        ends = [line[-1] + 1 for line in lines[1]]
        lowest = min(len(own.ids[lane]) for lane in new)
        inputs = self._on_host(lines).to(self._loaded.device, non_blocking=True)
        index = self._on_host(at).to(self._loaded.device, non_blocking=True)
        feed = ManyLanes(
            lanes=slice(at[0], at[-1] + 1) if len(at) == len(whole) else index,
            lane_index=index[:, None],
            slots=inputs[2],
            first={w: 0 if w is None else max(lowest - w + 1, 0) for w in self._cache.windows},
            end=max(ends),
        )
        on_cpu = self._loaded.device.type == "cpu"
        with states_in_common(in_common([own.ids[lane] for lane in new]) if on_cpu else 0, feed.end):
            return self._fed(new, at, self._masked(feed, inputs, positions))

    def _feed_fixed(self, new: dict[int, list[int]], positions: int) -> dict[int, Known]:
        """Short pieces of any lanes in one forward over all lanes, whose shape is one of a few."""
        width = _width(max(map(len, new.values())))
        positions = _width(positions)
        at = list(range(self._lanes.count))
        logits = self._run_fixed(self._lines(new, at, width), positions)
        return self._fed(new, at, logits.clone())  # the step's own are overwritten by the next

    def feed_unread(self, lanes: Sequence[int], tokens: torch.Tensor, ahead: int) -> torch.Tensor:
        """One more token of each of these lanes, over fixed buffers; the host does not know it.

        The lanes (`Lanes.ids`) get it when it was read, as the tokens fed before it in this way.

        Args:
            lanes: each with ids.
            tokens: int64 [len(lanes)], on the device.
            ahead: how many of each lane's tokens were fed before it in this way.

        Returns:
            logits [len(lanes), V], which the next step may write over.
        """
        at = [self._lanes.cache_lane(lane) for lane in lanes]
        # What stands in for the tokens' ids on the host is what lanes that are not fed read.
        lines = self._lines({lane: [0] for lane in lanes}, list(range(self._lanes.count)), 1, ahead)
        whole = at == list(range(self._lanes.count))
        index = None if whole else to_device(at, self._loaded.device)
        ids = tokens if index is None else tokens.new_zeros(self._lanes.count).index_copy_(0, index, tokens)
        logits = self._run_fixed(lines, 1, ids[:, None])[:, 0]
        self.tokens_fed += len(lanes)
        return logits if index is None else logits.index_select(0, index)

    def _run_fixed(
        self, lines: list[list[list[int]]], positions: int, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A forward over all lanes, whose shape is one of a few; see `FixedSteps.run`."""
        end = max(line[-1] + 1 for line in lines[1])

        def forward(inputs: torch.Tensor, end: int) -> torch.Tensor:
            index = torch.arange(self._lanes.count, device=inputs.device)[:, None]
            first = dict.fromkeys(self._cache.windows, 0)
            return self._masked(ManyLanes(slice(None), index, inputs[2], first, end), inputs, positions)

        slots = self._cache.slots
        return self._steps.run(self._on_host(lines), end, slots, positions, forward, ids=ids)

    def _lines(
        self, new: Mapping[int, list[int]], at: list[int], width: int, ahead: int = 0
    ) -> list[list[list[int]]]:
        """Ids, positions and slots ``[3][cache lanes][width]`` of a forward, padded on the left.

        So that each lane's last token is the last of its line. Padding repeats the lane's first new token: it
        attends to what that one attends to, and its states go to the slot that nothing ever reads. A lane
        that is not fed has padding only. The new tokens come `ahead` places after what the lanes hold.
        """
        unread = self._cache.slots - 1
        lowest = min(len(self._lanes.ids[lane]) for lane in new) + ahead
        filler = next(iter(new.values()))[0]
        tokens, positions, slots = [], [], []
        for cache_lane in at:
            lane = self._lanes.at(cache_lane)
            ids = [] if lane is None else new.get(lane, [])
            start = len(self._lanes.ids[lane]) + ahead if lane is not None and ids else lowest
            padding = width - len(ids)
            following = list(range(start, start + len(ids)))
            tokens.append([ids[0] if ids else filler] * padding + ids)
            positions.append([start] * padding + following)
            slots.append([unread] * padding + following)
        return [tokens, positions, slots]

    def _fed(self, new: dict[int, list[int]], at: list[int], logits: torch.Tensor) -> dict[int, Known]:
        """The forward over these cache lanes is done: the lanes hold what they were fed."""
        index = {cache_lane: i for i, cache_lane in enumerate(at)}
        for lane, ids in new.items():
            self._lanes.ids[lane].extend(ids)
            self.tokens_fed += len(ids)
        return {
            lane: Known(logits, index[self._lanes.cache_lane(lane)], min(len(ids), logits.shape[1]))
            for lane, ids in new.items()
        }

    def _on_host(self, values: list[Any]) -> torch.Tensor:
        """An int64 tensor, in memory from which it can be sent without waiting."""
        return torch.tensor(values, device="cpu", pin_memory=self._loaded.device.type == "cuda")

    def _masked(self, feed: ManyLanes, inputs: torch.Tensor, wanted: int) -> torch.Tensor:
        ids, positions, _ = inputs
        mask = attention_mask(positions, feed, self._loaded.dtype)
        last = self._last(positions.shape[1], wanted)
        return self._run(
            feed, input_ids=ids, position_ids=positions, attention_mask=mask, logits_to_keep=last
        )

    def _last(self, width: int, positions: int) -> torch.Tensor:
        """The last positions of a forward as an index, not as a number, which gives a view with gaps.

        Of such a view torch takes the product with the vocabulary row by row (of a batch: 80 ms for SmolLM2,
        500 for Gemma), and in bfloat16 it copies the head's weights first (one lane: 1,000 ms for Qwen 0.5B).
        """
        return torch.arange(width - positions, width, device=self._loaded.device)

    def _run(self, feed: OneLane | ManyLanes, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        own = self._loaded
        with self._turn, small_products(own.device, own.dtype, input_ids.numel()):
            output = own.model(
                input_ids=input_ids, past_key_values=self._cache.at(feed), use_cache=True, **inputs
            )
        logits: torch.Tensor = output.logits
        return logits


def _width(tokens: int) -> int:
    """The least of `WIDTHS` that holds so many."""
    return next(width for width in WIDTHS if width >= tokens)
