"""`topk_softmax`: see csrc/ops/topk_softmax.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ops.checks import (
    FLOAT_CODES,
    backend_of,
    check_tensor,
    largest_entries,
    whole_setting,
    workspace,
)

# logits, dtype, batch, vocab, k, ids, probs, tail, status, as the core takes them
_Packed = tuple[int, int, int, int, int, int, int, int, int]

# The operation's, and one of `Distribution.without`.
NOTHING_LEFT = 3
_ROW_STATUS = {
    1: "NaN or +inf among its logits",
    2: "nothing but -inf among its logits",
    NOTHING_LEFT: "no token that may be written among the few that its backend names; let it name more",
}


class TopK(NamedTuple):
    """The k most probable tokens of each batch row, sorted down, ties to the lower id."""

    ids: torch.Tensor  # int32 [B, k]
    probs: torch.Tensor  # float32 [B, k], of the full softmax
    tail: torch.Tensor  # float32 [B], what the other tokens have together
    status: torch.Tensor  # int32 [B], 0 where the batch row has a softmax

    def check(self, name: str) -> None:
        """Raise InputError for a batch row that has no softmax. On CUDA this waits for the device."""
        check_status(name, self.status.tolist())


def check_status(name: str, status: Sequence[int], rows: Sequence[int] | None = None) -> None:
    """Raise InputError for a batch row that has no softmax, by its status.

    Args:
        name: what to call the logits.
        status: [B], on the host.
        rows: what to call each batch row in the error; None: 0 to B - 1.
    """
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
        InputError: wrong shape, dtype, device or k; on the CPU also a batch row with NaN, +inf or nothing
            but -inf. On CUDA nothing waits for the device: call `.check(name)` on the result when you
            read from it anyway.
    """
    found = launch(logits, k, name=name)
    if logits.device.type == "cpu":
        found.check(name)
    return found


def topk_softmax_many(
    logits: Sequence[torch.Tensor], k: int, *, names: Sequence[str] | None = None
) -> list[TopK]:
    """`topk_softmax` of several tensors at once: on a CUDA device in the launches of one.

    Args:
        logits: [B_i, V_i] of any vocabularies, batches, dtypes and devices, each as in `topk_softmax`.
        k: at least 1; a vocabulary of fewer tokens gives all it has.
        names: what to call each of the logits in an error.

    Raises:
        InputError: see `topk_softmax`.
    """
    names = [f"logits {i}" for i in range(len(logits))] if names is None else names
    found = launch_many(logits, k, names)
    for name, one, given in zip(names, found, logits, strict=True):
        if given.device.type == "cpu":
            one.check(name)
    return found


def launch(logits: torch.Tensor, k: int, *, name: str = "logits") -> TopK:
    """`topk_softmax` without looking at the status, on any device."""
    return launch_many([logits], k, [name], cut=False)[0]


def launch_many(
    logits: Sequence[torch.Tensor], k: int, names: Sequence[str], *, cut: bool = True
) -> list[TopK]:
    """`topk_softmax_many` without looking at the status; with `cut` a k above V stands for V."""
    k = whole_setting("k", k)
    found = []
    by_device: dict[torch.device, list[_Packed]] = {}
    for name, one in zip(names, logits, strict=True):
        check_tensor(name, one, shape=[None, None], dtype=FLOAT_CODES)
        (batch, vocab), device = one.shape, one.device
        top = vocab if cut and k > vocab else k
        if not 1 <= top <= vocab:
            raise InputError(f"k is {k}; choose 1 to the vocabulary's {vocab}")
        ids, probs, tail, status = largest_entries(batch, top, device)
        found.append(TopK(ids, probs, tail, status))
        outputs = (ids.data_ptr(), probs.data_ptr(), tail.data_ptr(), status.data_ptr())
        packed = (one.data_ptr(), FLOAT_CODES[one.dtype], batch, vocab, top, *outputs)
        by_device.setdefault(device, []).append(packed)
    for device, members in by_device.items():
        backend = backend_of("topk_softmax", device)
        scratch = workspace(_core.topk_softmax_workspace(members, backend), device)
        _core.topk_softmax(members, scratch.data_ptr(), backend)
    return found
