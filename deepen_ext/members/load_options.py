"""How a member is loaded: one list of options for Python, the command line, presets and lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from deepen_ext.errors import InputError
from deepen_ext.ops.checks import check_built_for

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadOptions:
    """The options of one member. What a backend does not have is refused by its name when given.

    Attributes:
        backend: "transformers" or "llama.cpp". None: a ``.gguf`` file that goes to the CPU runs in llama.cpp
            where that is installed; everything else in transformers.
        device: where the model goes, for example "cpu", "cuda" or "cuda:1".
        dtype: of the weights: "float32", "float16", "bfloat16" or the ``torch.dtype``. None: float32 in
            transformers; in llama.cpp, which takes no other value, the types that the file has.
        threads: of llama.cpp's forward passes. None: as many as torch has.
        trust_remote_code: run code that the folder or the hub's repository brings along, where transformers
            has no class of its own for the model. False refuses such a model by name. Nothing asks on
            standard input.
    """

    backend: str | None = None
    device: str | torch.device = "cpu"
    dtype: str | torch.dtype | None = None
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            InputError: a value of a wrong type or out of range.
        """
        if type(self.trust_remote_code) is not bool:
            raise InputError(f"trust_remote_code is {self.trust_remote_code!r}; give True or False")
        dtype = DTYPES.get(self.dtype) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and dtype not in DTYPES.values():
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it, float32 where none is given."""
        dtype = DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype
        return torch.float32 if dtype is None else dtype

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    def refuse_others(self, backend: str, *known: str) -> None:
        """Refuse options that a backend does not have.

        Args:
            backend: its name, for the message.
            known: the options that it has, beside `backend`, `device` and `trust_remote_code`.

        Raises:
            InputError: another one is given.
        """
        for name, value in self.given().items():
            if name not in {"backend", "device", "trust_remote_code", *known}:
                raise InputError(
                    f"{name}={value!r} is no option of the backend {backend}; leave it out for this member, "
                    "or choose another backend"
                )


LOAD_OPTIONS = frozenset(one.name for one in fields(LoadOptions))


def options_of_each(members: int, **options: Any) -> list[LoadOptions]:
    """Each member's options, from keywords that are one value for all or a list of one for each.

    Raises:
        InputError: an option that there is not or out of range, a list of another length than the members',
            a device that is not there or that this build has no kernels for.
    """
    if unknown := sorted(options.keys() - LOAD_OPTIONS):
        raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(LOAD_OPTIONS))}")
    found: list[dict[str, Any]] = [{} for _ in range(members)]
    for name, value in options.items():
        values = list(value) if isinstance(value, list | tuple) else [value] * members
        if len(values) != members:
            raise InputError(
                f"there are {len(values)} of {name} for {members} members; give one, or one for each"
            )
        for own, one in zip(found, values, strict=True):
            own[name] = one
    each = [LoadOptions(**own) for own in found]
    each = [replace(one, device=find_device(one.device)) for one in each]
    for one in each:
        check_built_for(torch.device(one.device))
    return each


def find_device(device: str | torch.device) -> torch.device:
    """The device as tensors name it: with its index where it is CUDA.

    Raises:
        InputError: no such device, or a CUDA device that torch does not see.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be like 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise InputError(f"device {found}: torch sees {count} CUDA devices; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found
