"""Which part of a model goes to which device, and whether they have room for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import ModuleList
from transformers import AutoModelForCausalLM

from deepen_ext.errors import InputError
from deepen_ext.ground.warning import warn
from deepen_ext.members.devices import find_device
from deepen_ext.members.hf.quantisation import GROUP, check_device, is_quantised_layer
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.memory import available_bytes

DISK = "disk"
Places = dict[str, str | torch.device]
_NAMED = 3


def make_blueprint(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a config without memory for its weights."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def choose_places(blueprint: Any, options: LoadOptions, name: str) -> Places:
    """The device, or "disk", of each part of a model.

    Args:
        blueprint: the model without memory for its weights.
        options: `device_map`, and what limits it.
        name: of the member, for messages.

    Raises:
        InputError: parts without a device, names that the model does not have, devices without room or
            without the kernels for such weights.
    """
    if isinstance(options.device_map, str):
        places = _spread(blueprint, options)
    else:
        assert options.device_map is not None
        places = {part: _place(place) for part, place in options.device_map.items()}
        _check_names(blueprint, places, name)
        places = _taken_apart(blueprint, places)
        _check_tied(blueprint, places, name)
    sizes = _sizes(blueprint, options.quantization)
    used = _used(places, sizes)
    if set(used) == {DISK}:
        what = _largest(blueprint, sizes)
        raise InputError(
            f"{name}: device_map has no room: no part of the model is on a device that computes. Its largest "
            f"part that stays whole, {what}; let max_memory have more, or give the mapping a device"
        )
    if DISK in used and isinstance(options.device_map, str) and options.offload_folder is None:
        raise InputError(
            f"{name}: device_map={options.device_map!r} has no room for {used[DISK] / 1e9:.2f} of "
            f"{sum(used.values()) / 1e9:.2f} GB, which would go to the disk. Let max_memory have more, give "
            "quantization='int8', or offload_folder, where these weights are read from at every step"
        )
    for device in used:
        if options.quantization is not None:
            if device == DISK:
                raise InputError(
                    f"{name}: quantization={options.quantization!r} with parts on the disk, where torchao's "
                    "weights cannot wait; leave one of the two out"
                )
            check_device(options.quantization, torch.device(device), name)
    _check_kinds(used, options, name)
    check_room(used, name)
    return places


def as_accelerate_names(place: str | torch.device) -> str | int:
    """A device as accelerate takes it: "cpu", "disk", or the number of a CUDA device."""
    device = None if place == DISK else torch.device(place)
    return DISK if device is None else device.type if device.index is None else device.index


def weights_bytes(blueprint: Any, kind: str | None) -> int:
    """Bytes of a model's weights, tied ones once; as `quantization` rounds them."""
    return sum(_sizes(blueprint, kind).values())


def check_room(used: Mapping[str | torch.device, int], name: str) -> None:
    """Compare what a model's weights take with what its devices have.

    Raises:
        InputError: a device has less.
    """
    for device, size in used.items():
        if device != DISK and size > (free := available_bytes(torch.device(device))):
            raise InputError(
                f"{name}: its weights take {size / 1e9:.2f} GB on {device}, and {free / 1e9:.2f} GB are "
                "free; give quantization='int8' or 'int4', dtype='bfloat16', or device_map='auto' with an "
                "offload_folder"
            )


def _spread(blueprint: Any, options: LoadOptions) -> Places:
    """What accelerate makes of "auto" and the like."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory, get_max_memory

    kind = options.quantization
    whole = list(blueprint._no_split_modules or ())
    small = {"int8": torch.int8, "int4": CustomDtype.INT4, None: None}[kind]
    special = {} if small is None else dict.fromkeys(_quantised_names(blueprint), small)
    limits = None if options.max_memory is None else dict(options.max_memory)
    if options.device_map == "sequential":
        limits = get_max_memory(limits)
    else:
        limits = get_balanced_memory(
            blueprint,
            max_memory=limits,
            no_split_module_classes=whole,
            special_dtypes=special,
            low_zero=options.device_map == "balanced_low_0",
        )
    if kind is not None:  # scales are not counted
        limits = {device: int(0.85 * size) for device, size in limits.items()}
    found = infer_auto_device_map(
        blueprint, max_memory=limits, no_split_module_classes=whole, special_dtypes=special
    )
    return {part: _place(place) for part, place in found.items()}


def _place(place: int | str | torch.device) -> str | torch.device:
    if place == DISK:
        return DISK
    return find_device(torch.device("cuda", place) if isinstance(place, int) else place)


def _check_names(blueprint: Any, places: Places, name: str) -> None:
    parts = {part for part, _ in blueprint.named_modules()} | set(_sizes(blueprint, None))
    if unknown := [part for part in places if part not in parts]:
        raise InputError(
            f"{name}: device_map names {unknown[0]!r}, and the model ({type(blueprint).__name__}) has no "
            f"such part; its parts are {', '.join(_top_parts(blueprint))}"
        )
    if homeless := [weight for weight in _sizes(blueprint, None) if _where(weight, places) is None]:
        more = f" and {len(homeless) - _NAMED} more" if len(homeless) > _NAMED else ""
        raise InputError(
            f"{name}: device_map gives no device for {', '.join(homeless[:_NAMED])}{more}; name their "
            "modules, or give '' a device, which is that of all others"
        )


def _taken_apart(module: torch.nn.Module, places: Places, name: str = "") -> Places:
    """The same with no part inside of another, as accelerate needs it.

    For example ``{"": "cpu", "lm_head": "disk"}`` becomes ``{"model": "cpu", "lm_head": "disk"}``.
    """
    place = _where(name, places)
    if not any(part.startswith(f"{name}." if name else "") and part != name for part in places):
        assert place is not None
        return {name: place}
    found: Places = {}
    for part, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        full = f"{name}.{part}" if name else part
        own = _where(full, places)
        assert own is not None
        found[full] = own
    for part, child in module.named_children():
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            found |= _taken_apart(child, places, f"{name}.{part}" if name else part)
    return found


def _check_tied(blueprint: Any, places: Places, name: str) -> None:
    for one, other in (getattr(blueprint, "all_tied_weights_keys", None) or {}).items():
        found = _where(one, places), _where(other, places)
        if DISK in found and found[0] != found[1]:
            raise InputError(
                f"{name}: device_map puts {one} on {found[0]} and {other} on {found[1]}, but they are one "
                "weight; give both the same place"
            )


def _top_parts(blueprint: Any) -> list[str]:
    """Names of a model's parts that a mapping usually lists."""
    names = [part for part, _ in blueprint.named_modules() if part and part.count(".") <= 1]
    layers = [f"{part}.0" for part, module in blueprint.named_modules() if isinstance(module, ModuleList)]
    return [*names[:_NAMED], *layers[:1], "..."]


def _where(weight: str, places: Places) -> str | torch.device | None:
    """The device of a weight: that of the longest name that it begins with."""
    while weight:
        if weight in places:
            return places[weight]
        weight = weight.rpartition(".")[0]
    return places.get("")


def _sizes(blueprint: Any, kind: str | None) -> dict[str, int]:
    """Bytes of each weight and buffer, tied ones once."""
    quantised = set(_quantised_names(blueprint)) if kind is not None else set()
    # The scales: float32, one for a row, its zero point as a byte; bfloat16 with an offset, for each group.
    bits = {"int8": 8.0, "int4": 4 + 32 / GROUP, None: 0.0}[kind]
    tensors = [*blueprint.named_parameters(), *blueprint.named_buffers()]
    return {
        name: int(one.numel() * bits / 8) + (5 * one.shape[0] if kind == "int8" else 0)
        if name in quantised
        else one.nbytes
        for name, one in tensors
    }


def _quantised_names(blueprint: Any) -> list[str]:
    modules = blueprint.named_modules()
    return [f"{part}.weight" for part, module in modules if is_quantised_layer(blueprint, module)]


def _used(places: Places, sizes: Mapping[str, int]) -> dict[str | torch.device, int]:
    """Bytes on each device."""
    used: dict[str | torch.device, int] = {}
    for weight, size in sizes.items():
        place = _where(weight, places)
        assert place is not None
        used[place] = used.get(place, 0) + size
    return used


def _largest(blueprint: Any, sizes: Mapping[str, int]) -> str:
    """The largest part that accelerate does not take apart, and its size, in words."""
    whole = set(blueprint._no_split_modules or ())
    found = {}
    for part, module in blueprint.named_modules():
        leaf = not any(True for _ in module.children())
        if part and (leaf or type(module).__name__ in whole):
            found[part] = sum(size for name, size in sizes.items() if name.startswith(f"{part}."))
    part = max(found, key=lambda one: found[one])
    return f"{part}, takes {found[part] / 1e6:.0f} MB"


def _check_kinds(used: Mapping[str | torch.device, int], options: LoadOptions, name: str) -> None:
    """Weights that wait elsewhere than where they are computed: say so, or refuse it."""
    kinds = {torch.device(one).type for one in used if one != DISK}
    away = [str(one) for one in used if one == DISK or (kinds > {"cpu"} and torch.device(one).type == "cpu")]
    if not away:
        return
    if options.quantization is not None:
        raise InputError(
            f"{name}: quantization={options.quantization!r} with parts on {' and '.join(away)} that another "
            "device computes: torchao's weights cannot wait there; leave one of the two out"
        )
    size = sum(bytes_ for one, bytes_ in used.items() if str(one) in away)
    warn(
        f"{name}: {size / 1e9:.2f} of {sum(used.values()) / 1e9:.2f} GB of its weights are on "
        f"{' and '.join(away)} and are read from there at every step, which is slow"
    )
