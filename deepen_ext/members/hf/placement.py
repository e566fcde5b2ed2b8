"""Where the parts of a loaded model are computed, when accelerate spread it over several devices."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch

from deepen_ext.members.hf.loaded_model import inner_model


def is_spread(model: torch.nn.Module) -> bool:
    """Whether the model's parts lie on several devices, or on the disk.

    accelerate's hooks then move inputs, masks and states from part to part.
    """
    places = getattr(inner_model(model), "hf_device_map", None) or {}
    return len(set(places.values())) > 1


def waits_elsewhere(model: torch.nn.Module) -> bool:
    """Whether some weights lie on the disk or the host, and come to their device for each forward pass."""
    return any(weight.is_meta for weight in model.parameters())


def one_at_a_time(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """A lock for forward passes of a model whose weights come and go: threads share its modules."""
    if not waits_elsewhere(model):
        return nullcontext()
    with _lock:
        return _locks.setdefault(model, threading.Lock())


_lock = threading.Lock()  # of the others
_locks: WeakKeyDictionary[torch.nn.Module, threading.Lock] = WeakKeyDictionary()


def home(model: torch.nn.Module) -> torch.device:
    """Where a model takes its ids. Its logits are moved there, once, by accelerate."""
    return runs_on(inner_model(model).get_input_embeddings())


def runs_on(module: torch.nn.Module) -> torch.device:
    """The device that computes a module. Weights that wait on the disk or the host are moved there."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


def layer_devices(model: torch.nn.Module) -> dict[int, torch.device]:
    """Of a model that is spread, the device of each attention layer by its number in the cache; else {}."""
    found: dict[int, torch.device] = {}
    if not is_spread(model):
        return found
    for module in inner_model(model).modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer not in found and next(module.parameters(), None) is not None:
            found[layer] = runs_on(module)
    return found
