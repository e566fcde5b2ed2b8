"""What a server said of a position, checked, and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from deepen_ext.ops.topk_softmax import TopK

# A log-probability is below 0 but for rounding, and a distribution sums to 1 or less but for rounding.
_ROUNDING = 1e-3


class Row(NamedTuple):
    """Tokens and their log-probabilities after one position, in any order."""

    ids: Sequence[Any]
    logprobs: Sequence[Any]


class BadRow(Exception):
    """A row that cannot be used; the text says why, as in "gave 3 of 5 tokens"."""


def to_topk(rows: Sequence[Row], k: int, vocab_size: int, device: torch.device) -> TopK:
    """The k most probable tokens of each row, sorted down, ties to the lower id.

    Args:
        rows: what the server gave, at least k tokens each.
        k: how many are kept.
        vocab_size: ids are below it.
        device: of the tensors.

    Raises:
        BadRow: fewer tokens, ids outside the vocabulary or twice, NaN, or no log-probabilities.
    """
    ids = np.empty((len(rows), k), np.int32)
    probs = np.empty((len(rows), k), np.float32)
    for at, row in enumerate(rows):
        ids[at], probs[at] = _sorted(row, k, vocab_size)
    sums = probs.sum(1, dtype=np.float64)
    probs /= np.maximum(sums, 1.0).astype(np.float32)[:, None]
    tail = np.maximum(1.0 - sums, 0.0).astype(np.float32)
    status = torch.zeros(len(rows), dtype=torch.int32, device=device)
    tensors = [torch.from_numpy(one).to(device) for one in (ids, probs, tail)]
    return TopK(tensors[0], tensors[1], tensors[2], status)


def _sorted(row: Row, k: int, vocab_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    if len(row.ids) < k or len(row.logprobs) != len(row.ids):
        raise BadRow(
            f"gave {len(row.ids)} tokens with {len(row.logprobs)} log-probabilities of {k} asked for"
        )
    try:
        ids = np.array(row.ids, np.int64)
        logprobs = np.array(row.logprobs, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("gave tokens or log-probabilities that are no numbers") from None
    if ids.ndim != 1 or logprobs.ndim != 1:
        raise BadRow("gave tokens or log-probabilities that are no numbers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise BadRow(f"gave the token id {wrong}, outside the vocabulary of {vocab_size}")
    if np.isnan(logprobs).any():
        raise BadRow("gave a log-probability that is NaN")
    if logprobs.max() > _ROUNDING:
        raise BadRow(f"gave the log-probability {logprobs.max():.6g}, above 0")
    probs = np.exp(logprobs).astype(np.float32)
    order = np.lexsort((ids, -probs))[:k]
    ids, probs = ids[order], probs[order]
    if len(np.unique(ids)) < k:
        raise BadRow("gave a token twice")
    if (total := float(probs.sum())) > 1 + _ROUNDING:
        raise BadRow(f"gave probabilities that sum to {total:.4f}")
    return ids, probs
