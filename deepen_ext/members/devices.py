"""Devices by their names."""

from __future__ import annotations

import torch

from deepen_ext.errors import InputError, shown


def find_device(device: str | torch.device) -> torch.device:
    """The device as tensors name it: with its index where it is CUDA.

    Raises:
        InputError: no such device, or a CUDA device that torch does not see.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be like 'cpu' or 'cuda:0', got {shown(device)}") from error
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise InputError(f"device {found}: torch sees {count} CUDA devices; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found
