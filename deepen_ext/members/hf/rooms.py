"""What a session works in, kept for the model's next session: on CUDA its captured steps are worth it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from deepen_ext.members.hf.fixed_steps import FixedSteps
from deepen_ext.members.hf.kv_cache import LaneCache
from deepen_ext.members.hf.loaded_model import LoadedModel
from deepen_ext.members.hf.placement import is_spread
from deepen_ext.members.memory import gives_back

_lock = threading.Lock()  # of the idle rooms


@dataclass
class Room:
    """What a session works in; on CUDA the next session of the model takes it over, graphs and all."""

    cache: LaneCache
    steps: FixedSteps
    stream: torch.cuda.Stream | None
    weights: int  # where they lie: graphs hold their addresses


_idle: WeakKeyDictionary[PreTrainedModel, Room] = WeakKeyDictionary()  # no room refers to its model


def take_room(loaded: LoadedModel, lanes: int, capacity: int) -> Room:
    """The model's idle room if it fits, else a new one; what does not fit is freed."""
    with _lock:
        room = _idle.pop(loaded.model, None)
    weights = hash(tuple(one.data_ptr() for one in loaded.model.parameters()))
    stays = room is not None and room.weights == weights
    if room is not None and stays and room.cache.lanes == lanes and room.cache.slots > capacity:
        return room
    if room is not None and stays:  # cuBLAS keeps a workspace for each stream that was ever used
        stream = room.stream
    else:
        # On several devices each part runs on its device's current stream, between which torch's copies wait.
        own = loaded.device.type == "cuda" and not is_spread(loaded.model)
        stream = torch.cuda.Stream(loaded.device) if own else None  # type: ignore[no-untyped-call]
    return Room(LaneCache(loaded, lanes), FixedSteps(loaded.name, loaded.device), stream, weights)


def leave_room(loaded: LoadedModel, room: Room) -> None:
    """Keep the room for the model's next session; one room is kept."""
    with _lock:
        _idle[loaded.model] = room


def forget_room(loaded: LoadedModel) -> None:
    """Free the model's idle room, if there is one."""
    with _lock:
        _idle.pop(loaded.model, None)


def idle_bytes(loaded: LoadedModel) -> int:
    """Bytes of the model's idle room: its next session takes it over, or gives it back."""
    with _lock:
        room = _idle.get(loaded.model)
    return 0 if room is None else room.cache.nbytes


@gives_back
def free_idle(device: torch.device) -> None:
    """Give back all idle rooms on the device, graphs and all."""
    with _lock:
        for model in [model for model in _idle if model.device == device]:
            del _idle[model]
