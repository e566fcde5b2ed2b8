"""`topk_softmax`: see csrc/ops/topk_softmax.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ops.checks import FLOAT_CODES, backend_of, check_tensor, workspace

_ROW_STATUS = {1: "NaN or +inf among its logits", 2: "nothing but -inf among its logits"}


class TopK(NamedTuple):
    """The k most probable tokens of each row, sorted down, ties to the lower id."""

    ids: torch.Tensor  # int32 [B, k]
    probs: torch.Tensor  # float32 [B, k], of the full softmax
    tail: torch.Tensor  # float32 [B], what the other tokens have together
    status: torch.Tensor  # int32 [B], 0 where the row has a softmax

    def check(self, name: str) -> None:
        """Raise InputError for a row that has no softmax. On CUDA this waits for the device."""
        check_status(name, self.status.tolist())


def check_status(name: str, status: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """Raise InputError for a row that has no softmax, by its status [B] on the host."""
    for row, code in zip(range(len(status)) if rows is None else rows, status, strict=True):
        if code:
            raise InputError(f"{name}: row {row} has no softmax, there is {_ROW_STATUS[code]}")


def topk_softmax(logits: torch.Tensor, k: int, *, name: str = "logits") -> TopK:
    """The k largest entries of softmax(logits) in one read of the logits.

    Equals `torch.softmax(logits.float(), -1).topk(k)`, with ties going to the lower id.

    Args:
        logits: float32, float16 or bfloat16 [B, V], contiguous. -inf is probability 0.
        k: 1 to V.
        name: what to call the logits in an error.

    Raises:
        InputError: wrong shape, dtype, device or k; on the CPU also a row with NaN, +inf or nothing but
            -inf. On CUDA nothing waits for the device: call `.check(name)` on the result when you read from
            it anyway.
    """
    found = launch(logits, k, name=name)
    if logits.device.type == "cpu":
        found.check(name)
    return found


def launch(logits: torch.Tensor, k: int, *, name: str = "logits") -> TopK:
    """`topk_softmax` without looking at the status, on any device."""
    check_tensor(name, logits, shape=[None, None], dtype=tuple(FLOAT_CODES))
    backend = backend_of("topk_softmax", logits)
    batch, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise InputError(f"k is {k}; choose 1 to the vocabulary's {vocab}")
    device = logits.device
    found = TopK(
        ids=torch.empty(batch, k, dtype=torch.int32, device=device),
        probs=torch.empty(batch, k, dtype=torch.float32, device=device),
        tail=torch.empty(batch, dtype=torch.float32, device=device),
        status=torch.empty(batch, dtype=torch.int32, device=device),
    )
    scratch = workspace(_core.topk_softmax_workspace(batch, vocab, k, backend), device)
    _core.topk_softmax(
        logits.data_ptr(),
        FLOAT_CODES[logits.dtype],
        batch,
        vocab,
        k,
        found.ids.data_ptr(),
        found.probs.data_ptr(),
        found.tail.data_ptr(),
        found.status.data_ptr(),
        scratch.data_ptr(),
        backend,
    )
    return found
