"""`topk_softmax`: see csrc/ops/topk_softmax.h."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ops.checks import FLOAT_CODES, check_cpu, check_tensor, workspace

_ROW_STATUS = {1: "NaN or +inf among its logits", 2: "nothing but -inf among its logits"}


class TopK(NamedTuple):
    """The k most probable tokens of each row, sorted down, ties to the lower id."""

    ids: torch.Tensor  # int32 [B, k]
    probs: torch.Tensor  # float32 [B, k], of the full softmax
    tail: torch.Tensor  # float32 [B], what the other tokens have together


def topk_softmax(logits: torch.Tensor, k: int, *, name: str = "logits") -> TopK:
    """The k largest entries of softmax(logits) in one read of the logits.

    Equals `torch.softmax(logits.float(), -1).topk(k)`, with ties going to the lower id.

    Args:
        logits: float32, float16 or bfloat16 [B, V], contiguous. -inf is probability 0.
        k: 1 to V.
        name: what to call the logits in an error.

    Raises:
        InputError: wrong shape, dtype, device or k; a row with NaN, +inf or nothing but -inf.
    """
    check_tensor(name, logits, shape=[None, None], dtype=tuple(FLOAT_CODES))
    check_cpu("topk_softmax", logits.device)
    batch, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise InputError(f"k is {k}; choose 1 to the vocabulary's {vocab}")
    ids = torch.empty(batch, k, dtype=torch.int32)
    probs = torch.empty(batch, k, dtype=torch.float32)
    tail = torch.empty(batch, dtype=torch.float32)
    status = torch.empty(batch, dtype=torch.int32)
    threads = max(1, min(batch, torch.get_num_threads()))
    scratch = workspace(_core.topk_softmax_workspace(vocab, k, threads), logits.device)
    _core.topk_softmax(
        logits.data_ptr(),
        FLOAT_CODES[logits.dtype],
        batch,
        vocab,
        k,
        ids.data_ptr(),
        probs.data_ptr(),
        tail.data_ptr(),
        status.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    for row, code in enumerate(status.tolist()):
        if code:
            raise InputError(f"{name}: row {row} has no softmax, there is {_ROW_STATUS[code]}")
    return TopK(ids, probs, tail)
