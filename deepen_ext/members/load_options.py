"""How a member is loaded: one list of options for Python, the command line, presets and lm-eval."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from deepen_ext.cluster.placement import Placement
from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number, true_or_false
from deepen_ext.members.devices import find_device
from deepen_ext.members.registry import BACKENDS, PROTOCOLS
from deepen_ext.ops.checks import check_built_for

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
KEY_FORMS = "env:NAME or file:PATH"
_OF_EVERY_BACKEND = ("backend", "device", "threads", "trust_remote_code")
ONLY_HTTP = ("protocol", "tokenizer", "api_key", "timeout")
QUANTIZATIONS = ("int8", "int4")

_TEXTS = {
    "offload_folder": "the path of a folder",
    "adapter": "the path of its folder, or its hub name",
    "revision": "a branch, a tag or a commit of the hub, such as 'main'",
    "attn_implementation": "a name that transformers knows, such as 'sdpa'",
    "tokenizer": "a folder, a hub name, the path of a .gguf file, or demo:NAME",
}
_BYTES = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


@dataclass(frozen=True)
class LoadOptions:
    """The options of one member. What a backend does not have is refused by its name when given.

    Attributes:
        backend: "transformers", "llama.cpp" or "http". None: a ``.gguf`` file that goes to the CPU runs in
            llama.cpp where that is installed; a server's address is asked by HTTP; everything else runs in
            transformers.
        device: where the model goes, for example "cpu", "cuda" or "cuda:1". Of a server: where its
            distributions go.
        dtype: of the weights: "float32", "float16", "bfloat16" or the ``torch.dtype``. None: float32 in
            transformers; in llama.cpp, which takes no other value, the types that the file has.
        threads: CPU threads of the forward passes, for example 4. None: as many as torch has. In transformers
            they are torch's, which are the same for all members of a process.
        trust_remote_code: run code that the folder or the hub's repository brings along, where transformers
            has no class of its own for the model. False refuses such a model by name. Nothing asks on
            standard input.
        device_map: spreads one model over several devices, in place of `device`: "auto", "balanced",
            "balanced_low_0" or "sequential", which accelerate explains; or a mapping of module names to
            devices, for example ``{"model.embed_tokens": "cpu", "model.layers.0": 0, "": "disk"}``.
        max_memory: the most that `device_map` may put on each device, for example
            ``{0: "20GiB", "cpu": "30GiB"}``: numbers of CUDA devices or "cpu", with bytes or a text.
        offload_folder: where the layers are kept that `device_map` puts on "disk".
        quantization: "int8" or "int4": the weights are rounded to it by torchao as they are loaded, and the
            activations stay as they are. For checkpoints that are quantised already leave it out.
        adapter: a PEFT adapter on the model: its folder, or its hub name. ``"base@adapter"`` as the member's
            name means the same.
        revision: of a hub model: a branch, a tag or a commit, for example "main".
        attn_implementation: how transformers computes attention: "sdpa" (the default) or "eager". Others do
            not take the masks that sessions need, and are refused.
        protocol: of a server: "llama.cpp", "openai" (vLLM and others of this style) or "sglang". None: found
            out.
        tokenizer: of a server's model: a folder, a hub name, a ``.gguf`` file, or ``demo:NAME``.
        api_key: where the server's key is: "env:NAME", a variable of the environment, or "file:PATH". The key
            itself is refused, because options are written down.
        placement: runs the member in an actor of Ray: where, and with what resources
            (`deepen_ext.cluster.placement.Placement` documents it), for example ``{"num_cpus": 2, "num_gpus":
            1}``, or {} for one CPU anywhere. The other options then hold for the actor's machine.
        timeout: of a member that runs elsewhere, the most seconds that one request may take. Given for all
            members, it holds for those. None: 60 of a server, its repeats included; 600 of an actor.
    """

    backend: str | None = None
    device: str | torch.device = "cpu"
    dtype: str | torch.dtype | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    device_map: str | Mapping[str, int | str | torch.device] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | Path | None = None
    quantization: str | None = None
    adapter: str | Path | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    protocol: str | None = None
    tokenizer: str | Path | None = None
    api_key: str | None = None
    placement: Mapping[str, Any] | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            InputError: a value of a wrong type or out of range, or options that exclude each other.
        """
        true_or_false("trust_remote_code", self.trust_remote_code)
        if not isinstance(self.device, str | torch.device):
            raise InputError(f"device must be like 'cpu' or 'cuda:0', got {shown(self.device)}")
        for name, choices in (
            ("backend", tuple(BACKENDS)),
            ("quantization", QUANTIZATIONS),
            ("protocol", PROTOCOLS),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or value not in choices):
                raise InputError(f"there is no {name} {shown(value)}; there are {', '.join(choices)}")
        known = (
            self.dtype in DTYPES if isinstance(self.dtype, str) else self.dtype in (None, *DTYPES.values())
        )
        if not known:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.threads is not None and not (type(self.threads) is int and 1 <= self.threads < 1 << 16):
            raise InputError(f"threads is {shown(self.threads)}; give a whole number from 1 to 65,535")
        for name, what in _TEXTS.items():
            value = getattr(self, name)
            kinds = str | Path if "folder" in what else str
            if value is not None and (not isinstance(value, kinds) or str(value).strip() in ("", ".")):
                raise InputError(f"{name} is {shown(value)}; give {what}")
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise InputError(
                f"attn_implementation={shown(self.attn_implementation)} is a kernel of the hub, and so code "
                "that runs here; give trust_remote_code=True (--trust-remote-code) if you trust it"
            )
        self._check_server()
        self._check_device_map()
        self._check_elsewhere()

    def _check_elsewhere(self) -> None:
        if self.timeout is not None:
            real_number("timeout", self.timeout, "seconds above 0", lambda seconds: 0 < seconds < 1e6)
        if self.placement is None:
            return
        placement = Placement.read(self.placement)
        on_gpu = self.device_map is not None or str(self.device).startswith("cuda")
        if on_gpu and not placement.num_gpus:
            raise InputError(
                f"placement: {placement} has no GPU, and the model is to use one; give num_gpus=1 or more"
            )

    def _check_server(self) -> None:
        if self.api_key is not None and not (
            isinstance(self.api_key, str) and re.fullmatch(r"(env|file):\s*\S.*", self.api_key)
        ):
            # What was given may be the key itself, so that it is not shown.
            raise InputError(
                f"api_key must be {KEY_FORMS}, where the key is; the key itself is never an option"
            )

    def _check_device_map(self) -> None:
        if self.device_map is None:
            for name in ("max_memory", "offload_folder"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} is for device_map; give device_map='auto', or leave {name} out. Where other "
                        "members have a device_map, give this one None (on the command line -)"
                    )
            return
        if str(self.device) != "cpu":
            raise InputError(
                f"device={str(self.device)!r} and device_map exclude each other; give one of them"
            )
        if isinstance(self.device_map, Mapping):
            for module, place in self.device_map.items():
                if not isinstance(module, str) or not _is_place(place):
                    raise InputError(
                        f"device_map: {shown(module)}: {shown(place)} is no module's name with a device; "
                        "give a CUDA device's number, 'cpu' or 'disk'"
                    )
        if not self.device_map or not (
            isinstance(self.device_map, Mapping) or self.device_map in DEVICE_MAPS
        ):
            raise InputError(
                f"device_map is {shown(self.device_map)}; give one of {', '.join(DEVICE_MAPS)}, or a mapping "
                "of module names to devices. For a model on one device give device"
            )
        if self.max_memory is not None and not (
            isinstance(self.max_memory, Mapping)
            and self.max_memory
            and all(map(_is_limit, self.max_memory, self.max_memory.values()))
        ):
            raise InputError(
                f"max_memory is {shown(self.max_memory)}; give a mapping of CUDA devices' numbers and 'cpu' "
                "to bytes, like {0: '20GiB', 'cpu': '30GiB'}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it, float32 where none is given."""
        dtype = DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype
        return torch.float32 if dtype is None else dtype

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        pairs = ((one, getattr(self, one.name)) for one in fields(self))
        return {one.name: value for one, value in pairs if value != one.default and str(value) != one.default}

    def refuse_others(self, backend: str, *known: str, member: str = "") -> None:
        """Refuse options that a backend does not have.

        Args:
            backend: its name, for the message.
            known: the options that it has, beside `backend`, `device`, `threads` and `trust_remote_code`.
            member: the member's name, for the message.

        Raises:
            InputError: another one is given.
        """
        for name, value in self.given().items():
            if name not in (*_OF_EVERY_BACKEND, *known):
                named = f"{member}: " if member else ""
                raise InputError(
                    f"{named}{name}={shown(value)} is no option of the backend {backend}; leave it out for "
                    "this member, or choose another backend"
                )


LOAD_OPTIONS = tuple(one.name for one in fields(LoadOptions))
ONLY_TRANSFORMERS = tuple(
    name for name in LOAD_OPTIONS if name not in (*_OF_EVERY_BACKEND, *ONLY_HTTP, "placement")
)


def options_of_each(members: Sequence[str | Path], **options: Any) -> list[LoadOptions]:
    """Each member's options, from keywords that are one value for all or a list of one for each.

    A mapping is one value for all. None, also within a list, is the option's default. Whether the devices are
    there is not looked at (`on_this_machine`).

    Args:
        members: their names, for errors.
        options: those of `LoadOptions`.

    Raises:
        InputError: an option that there is not or out of range, or a list that is not as long as the members.
    """
    if unknown := sorted(options.keys() - set(LOAD_OPTIONS)):
        raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(LOAD_OPTIONS))}")
    found: list[dict[str, Any]] = [{} for _ in members]
    for name, value in options.items():
        values = list(value) if isinstance(value, list | tuple) else [value] * len(members)
        if len(values) != len(members):
            raise InputError(
                f"there are {len(values)} of {name} for {len(members)} members; give one, or one for each"
            )
        for own, one in zip(found, values, strict=True):
            if one is not None or name == "trust_remote_code":  # whether to trust is said in full
                own[name] = one
    each = []
    for member, own in zip(members, found, strict=True):
        try:
            if "device" in own and "device_map" in own:
                raise InputError("device and device_map exclude each other; give one of them")
            each.append(LoadOptions(**own))
        except InputError as error:
            raise InputError(f"{member}: {error}") from error
    return each


def on_this_machine(options: LoadOptions) -> LoadOptions:
    """The options with the device as tensors name it.

    Raises:
        InputError: a device that is not there, or that this build has no kernels for.
    """
    device = find_device(options.device)
    check_built_for(device)
    return replace(options, device=device)


def _is_place(place: Any) -> bool:
    """Whether a value of `device_map` is a device."""
    if isinstance(place, int) and not isinstance(place, bool):
        return place >= 0
    if isinstance(place, str) and place != "disk":
        try:
            torch.device(place)
        except RuntimeError:
            return False
    return isinstance(place, str | torch.device)


def _is_limit(device: Any, limit: Any) -> bool:
    """Whether a device and the most that it may hold can stand in `max_memory`."""
    number = type(device) is int and device >= 0
    size = limit >= 0 if type(limit) is int else isinstance(limit, str) and _BYTES.fullmatch(limit)
    return (number or device in ("cpu", "mps")) and bool(size)
