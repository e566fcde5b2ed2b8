"""Small tensors to a device without waiting for it, and from it with one wait."""

from __future__ import annotations

from typing import Any

import torch


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor of these numbers on a device. To CUDA it is sent from pinned memory, so the host goes on."""
    there = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same on the host. From CUDA they come in one copy, for which the host waits once.

    Args:
        tensors: int32 or float32, of any shapes, on one device; at least one.
    """
    if tensors[0].device.type == "cpu":
        return list(tensors)
    flat = [one.reshape(-1).view(torch.int32) for one in tensors]
    parts = torch.split(torch.cat(flat).cpu(), [one.numel() for one in tensors])
    return [part.view(one.dtype).view(one.shape) for part, one in zip(parts, tensors, strict=True)]
