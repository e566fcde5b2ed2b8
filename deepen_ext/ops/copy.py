"""A copy of logits to write into."""

from __future__ import annotations

import ctypes

import torch

# torch shares a copy of more than 32,768 elements among its threads. For so few bytes that gains nothing, and
# the wait for the others costs milliseconds where another process keeps them from the processor.
_BYTES_FOR_ONE_THREAD = 1 << 22


def plain_copy(logits: torch.Tensor) -> torch.Tensor:
    """The same values in new memory, outside autograd and inference mode; up to 4 MiB by this thread alone.

    Logits made under inference_mode could not be written to outside it.
    """
    copy = torch.empty_like(logits, requires_grad=False)
    if logits.device.type == "cpu" and logits.is_contiguous() and logits.nbytes <= _BYTES_FOR_ONE_THREAD:
        ctypes.memmove(copy.data_ptr(), logits.data_ptr(), logits.nbytes)
    else:
        with torch.no_grad():
            copy.copy_(logits)
    return copy
