"""A text's ids as a tensor, for processors that look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.members.asking import common_prefix


class TextIds:
    """One text's ids as a tensor; only what is new is copied.

    For CUDA they lie in pinned memory: a copy from there does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[int] = []
        self._buffer = torch.empty(0, dtype=torch.long, device="cpu")

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """The ids as int64 [1, L] on the device.

        What was given out is never written over: it may still be looked at, or on its way to the device.
        """
        ids = list(ids)
        shared = common_prefix(self._held, ids)
        if shared < len(ids):
            if shared < len(self._held) or len(ids) > len(self._buffer):
                pinned = self._device.type == "cuda"
                with torch.inference_mode(False):  # the caller may be in it now, and not when ids are added
                    buffer = torch.empty(2 * len(ids), dtype=torch.long, device="cpu", pin_memory=pinned)
                buffer[:shared] = self._buffer[:shared]
                self._buffer = buffer
            self._buffer[shared : len(ids)] = torch.tensor(ids[shared:], dtype=torch.long, device="cpu")
            self._held = ids
        return self._buffer[None, : len(ids)].to(self._device, non_blocking=True)
