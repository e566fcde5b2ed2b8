"""What every operation asks of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import real_number, whole_number

# The core's dtype codes (csrc/core/dtype.h).
FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None],
    dtype: torch.dtype | Collection[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise InputError unless `tensor` is contiguous and has this shape (None: any), dtype and device."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise InputError(f"{name} is sparse or nested; pass a dense tensor")
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for size, want in zip(sizes, shape, strict=False):  # a dozen of these checks are in each step
        fits = fits and (want is None or want == size)
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} has shape {list(sizes)}; expected [{wanted}]")
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if tensor.dtype not in allowed:
        names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise InputError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; expected {names}")
    if device is not None and tensor.device != device:
        raise InputError(
            f"{name} is on {tensor.device}, but the other tensors are on {device}; move it with .to()"
        )
    if not tensor.is_contiguous():
        raise InputError(f"{name} is not contiguous; pass {name}.contiguous()")
    if tensor.is_neg():  # its memory holds the negated numbers
        raise InputError(f"{name} is a negated view; pass {name}.resolve_neg()")
    if tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.device.type in ("cpu", "cuda"):
        raise InputError(f"{name} has no memory: its storage was freed; bring the numbers back first")


def whole_setting(name: str, value: Any) -> int:
    """The value as an int that the core takes; its range is the core's to check. Else InputError."""
    if type(value) is int and -(2**31) <= value < 2**31:  # nearly always, in every step
        return value
    return whole_number(name, value, -(2**31), 2**31 - 1)


def real_setting(name: str, value: Any) -> float:
    """The value as a float; its range is the core's to check.

    Raises:
        InputError: no number.
    """
    return value if type(value) is float else real_number(name, value, "any", lambda _: True)


def backend_of(operation: str, device: torch.device) -> tuple[int, int, int]:
    """(threads, device, stream) for the core, on torch's current stream.

    Raises:
        InputError: a device the core has no kernel for, or a build without its CUDA part.
    """
    if device.type == "cpu":
        return torch.get_num_threads(), -1, 0
    if device.type != "cuda":
        raise InputError(
            f"{operation} has no {device.type} kernel; move its tensors to the CPU or a CUDA device"
        )
    check_built_for(device)
    stream = torch.cuda.current_stream(device)
    return 1, stream.device_index, stream.cuda_stream


def check_built_for(device: torch.device) -> None:
    """Raise InputError for a CUDA device if this build has no CUDA part, for any other that is no CPU."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"the core has no {device.type} kernels; use the CPU or a CUDA device")
    if device.type == "cuda" and not _core.cuda_compiled():
        raise InputError(
            f"asked to run on {device}, but this build of deepen-ext has no CUDA part; install the CUDA "
            "toolkit (nvcc) and build again with DEEPEN_CUDA=ON, install the distribution deepen-ext-cu13 in "
            "the place of this one, or use device='cpu'"
        )


def largest_entries(
    count: int, entries: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the `entries` largest probabilities of each of `count` distributions, not initialised.

    Returns:
        which: int32 [count, entries]; their probabilities: float32 [count, entries]; the sum of all others:
        float32 [count]; status: int32 [count].
    """
    return (
        torch.empty(count, entries, dtype=torch.int32, device=device),
        torch.empty(count, entries, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def workspace(size: int, device: torch.device) -> torch.Tensor:
    """Scratch memory of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def token_id_tensor(name: str, value: Any) -> torch.Tensor:
    """The value, if it is a tensor of whole numbers; floats would be cut, and a mask read as ids 0 and 1.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor of ids, not {type(value).__name__}")
    if value.dtype == torch.bool:
        raise InputError(f"{name} is a mask (bool); give the ids themselves: {name}.nonzero().flatten()")
    if value.is_floating_point() or value.is_complex():
        raise InputError(f"{name} is {str(value.dtype).removeprefix('torch.')}; give whole numbers (int64)")
    return value
