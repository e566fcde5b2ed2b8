"""Keys and values of several sequences, each of which rolls back on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from deepen_ext.errors import ModelError
from deepen_ext.members.hf.loaded_model import LoadedModel
from deepen_ext.members.hf.placement import layer_devices

BLOCK = 256  # slots the buffers grow by
CHUNK = 1024  # most tokens of one forward


@dataclass(frozen=True)
class OneLane:
    """New states of one sequence: ``count`` of them follow the ``start`` states its lane holds."""

    lane: int
    start: int
    count: int


@dataclass(frozen=True)
class ManyLanes:
    """New states of several sequences in one forward.

    ``lanes`` are those read: a slice gives views, an index tensor ``[b]`` a copy. The states of token q of
    the i-th of them go to lane ``lane_index[i, 0]``, slot ``slots[i, q]`` (int64 ``[b, 1]`` and ``[b, W]``).
    A layer sees slots ``first[window]`` to ``end - 1``; the mask says which of them each query attends to.
    """

    lanes: slice | torch.Tensor
    lane_index: torch.Tensor
    slots: torch.Tensor
    first: dict[int | None, int]
    end: int
    _copies: dict[torch.device, ManyLanes] = field(default_factory=dict, compare=False)

    def on(self, device: torch.device) -> ManyLanes:
        """The same with its index tensors on a layer's device; each device gets them once."""
        if self.slots.device == device:
            return self
        if device not in self._copies:
            lanes = self.lanes if isinstance(self.lanes, slice) else self.lanes.to(device)
            index, slots = self.lane_index.to(device), self.slots.to(device)
            self._copies[device] = replace(self, lanes=lanes, lane_index=index, slots=slots, _copies={})
        return self._copies[device]


@dataclass
class _Shared:
    """What all layers of one cache share."""

    name: str  # the member's, for errors
    lanes: int
    slots: int
    feed: OneLane | ManyLanes


class LaneCache:
    """A transformers cache whose layers write and read where the feed says.

    A lane is the room of one sequence. It is dense: slot s holds position s, so a rollback is nothing but a
    smaller number of slots used, which the session keeps; nothing is moved or masked out for good. The last
    slot holds no position: padding is written there. Slots are zeroed when they are made, because a masked
    state still meets the weights (0 times NaN is NaN).
    """

    def __init__(self, loaded: LoadedModel, lanes: int) -> None:
        self._shared = _Shared(loaded.name, lanes, slots=0, feed=OneLane(0, 0, 0))
        layers = _layers(loaded, self._shared)
        self.cache = Cache(layers=layers)
        self._own = [layer for layer in layers if isinstance(layer, _LaneLayer)]

    def at(self, feed: OneLane | ManyLanes) -> Cache:
        """The cache as the model's forward takes it, to be fed there."""
        self._shared.feed = feed
        return self.cache

    @property
    def slots(self) -> int:
        """Slots of a lane; the last one holds no position."""
        return self._shared.slots

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return self._shared.lanes

    @property
    def windows(self) -> list[int | None]:
        """The different windows of the layers; None stands for a layer that sees everything."""
        return list(dict.fromkeys(layer.window for layer in self._own))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers())

    @property
    def bytes_by_device(self) -> dict[torch.device, int]:
        """The same by device."""
        found: dict[torch.device, int] = {}
        for buffer in self._buffers():
            found[buffer.device] = found.get(buffer.device, 0) + buffer.nbytes
        return found

    def reserve(self, positions: int) -> None:
        """Make room for this many positions in every lane, keeping what the lanes hold."""
        if positions + 1 > self.slots:
            self._shared.slots = _slots(positions)
        for layer in self._own:  # each looks at its own size: an interrupted growth is finished here
            layer.grow(self.slots)

    def close_gap(self, lane: int, lanes: int) -> None:
        """Move lanes ``lane + 1`` to ``lanes - 1`` down by one, so that those in use stay side by side."""
        for buffer in self._buffers():
            for target in range(lane, lanes - 1):
                buffer[target].copy_(buffer[target + 1])

    def exchange(self, one: int, other: int, end: int) -> None:
        """Let two lanes change places; they hold positions up to ``end - 1``."""
        for buffer in self._buffers():
            kept = buffer[one, :, :end].clone()
            buffer[one, :, :end].copy_(buffer[other, :, :end])
            buffer[other, :, :end].copy_(kept)

    def copy_prefix(self, source: int, target: int, start: int, end: int) -> None:
        """Give lane ``target`` the states of positions ``start`` to ``end - 1`` of lane ``source``."""
        for buffer in self._buffers():
            buffer[target, :, start:end].copy_(buffer[source, :, start:end])

    def zero(self) -> None:
        """Forget all states, also such as are not finite."""
        for buffer in self._buffers():
            buffer.zero_()

    def _buffers(self) -> Iterator[torch.Tensor]:
        return (buffer for layer in self._own for buffer in layer.buffers())

    def clear(self) -> None:
        """Give the buffers back."""
        self._shared.slots = 0
        for layer in self._own:
            layer.keys = layer.values = None
            layer.is_initialized = False


class _LaneLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its hook for subclasses
    """Keys and values ``[lanes, heads, slots, d]`` of one attention layer.

    transformers' own layers copy the whole cache at every token (``torch.cat``), crop all lanes alike, and
    the sliding-window layer drops states that a later rollback needs. Here every state stays where it was
    written, and what a query sees is a view of the buffer (a copy where lanes in between take no part).
    """

    is_croppable = False

    def __init__(self, window: int | None, shared: _Shared) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.is_sliding = window is not None
        self._shared = shared

    def buffers(self) -> list[torch.Tensor]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        lanes, slots = self._shared.lanes, self._shared.slots
        self.keys, self.values = (
            states.new_zeros((lanes, states.shape[1], slots, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def grow(self, slots: int) -> None:
        if self.keys is not None and self.values is not None and self.keys.shape[2] < slots:
            self.keys, self.values = _grown(self.keys, slots), _grown(self.values, slots)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[b, heads, n, d]`` where the cache's feed says; returns what the queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        feed = self._shared.feed
        count = feed.count if isinstance(feed, OneLane) else feed.slots.shape[1]
        if key_states.shape[2] != count:
            raise ModelError(
                f"{self._shared.name}: its model makes {key_states.shape[2]} states of {count} tokens, and a "
                "text has a place for each token alone; take the model without the wrapper that adds them"
            )
        if isinstance(feed, OneLane):
            end = feed.start + key_states.shape[2]
            self.keys[feed.lane, :, feed.start : end] = key_states[0]
            self.values[feed.lane, :, feed.start : end] = value_states[0]
            lane, seen = slice(feed.lane, feed.lane + 1), slice(self._first_seen(feed.start), end)
            return self.keys[lane, :, seen], self.values[lane, :, seen]
        feed = feed.on(self.keys.device)
        self.keys[feed.lane_index, :, feed.slots] = key_states.transpose(1, 2)
        self.values[feed.lane_index, :, feed.slots] = value_states.transpose(1, 2)
        seen = slice(feed.first[self.window], feed.end)
        keys, values = self.keys[:, :, seen], self.values[:, :, seen]
        if isinstance(feed.lanes, slice):
            return keys[feed.lanes], values[feed.lanes]
        return keys.index_select(0, feed.lanes), values.index_select(0, feed.lanes)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What transformers builds its mask from; asked for only where one lane is fed."""
        first = self._first_seen(self.get_seq_length())
        return self.get_seq_length() - first + query_length, first

    def get_seq_length(self) -> int:
        feed = self._shared.feed
        return feed.start if isinstance(feed, OneLane) else feed.end

    def get_max_length(self) -> int:
        return -1

    def _first_seen(self, length: int) -> int:
        """First position that the query after `length` others can see."""
        return 0 if self.window is None else max(length - self.window + 1, 0)


def cache_bytes(loaded: LoadedModel, lanes: int, positions: int) -> dict[torch.device, int]:
    """Bytes by device of a cache with room for so many positions in each of its lanes."""
    layers = LaneCache(loaded, lanes).cache.layers  # first: it names layers that no such cache holds
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = int(2 * lanes * heads * _slots(positions) * largest_head(config) * loaded.dtype.itemsize)
    devices = layer_devices(loaded.model)
    found: dict[torch.device, int] = {}
    for layer, one in enumerate(layers):
        if isinstance(one, _LaneLayer):
            device = devices.get(layer, loaded.device)
            found[device] = found.get(device, 0) + size
    return found


def largest_head(config: Any) -> int:
    """Numbers in the key of one head; where layers differ, of the largest."""
    layers = list(getattr(config, "per_layer_config", None) or [config])
    return max(
        int(
            getattr(one, "qk_head_dim", None)
            or getattr(one, "head_dim", None)
            or one.hidden_size // one.num_attention_heads
        )
        for one in layers
    )


def _slots(positions: int) -> int:
    return -(-(positions + 1) // BLOCK) * BLOCK


def _grown(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    grown = buffer.new_zeros((*buffer.shape[:2], slots, buffer.shape[3]))
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _layers(loaded: LoadedModel, shared: _Shared) -> list[Any]:
    """A lane layer for each attention layer of the model, with the window that transformers would use."""
    layers: list[Any] = []
    for layer in DynamicCache(config=loaded.model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(_LaneLayer(layer.sliding_window, shared))
        elif type(layer) is DynamicLayer:
            layers.append(_LaneLayer(None, shared))
        elif not isinstance(layer, CacheLayerMixin) or type(layer).__name__ != "DummyLayer":
            raise ModelError(
                f"{loaded.name}: its layers of kind {type(layer).__name__} cannot be rolled back by tokens; "
                "use a model with attention layers only"
            )
        else:
            layers.append(layer)
    return layers
