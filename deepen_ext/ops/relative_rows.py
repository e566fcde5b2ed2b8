"""`relative_rows`: see csrc/ops/relative_rows.h."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import true_or_false
from deepen_ext.ops.checks import (
    FLOAT_CODES,
    backend_of,
    check_tensor,
    largest_entries,
    real_setting,
    whole_setting,
    workspace,
)


class Similarity(NamedTuple):
    """What relative rows are computed from: a model's embedding, its anchors, and how similarity counts."""

    embedding: torch.Tensor  # E: float32, float16 or bfloat16 [V, d], contiguous; read in place
    anchor_ids: torch.Tensor  # int64 [A]
    anchor_inverse_norm: torch.Tensor  # float32 [A], 1 / ||E[anchor_ids] - mean||_2
    mean: torch.Tensor | None  # float32 [d], taken off every embedding; None: nothing is
    temperature: float  # factor before the softmax, above 0
    normalise: bool  # divide the cosines of a relative row by their 2-norm
    entries: int  # m, 1 to A


def relative_rows(
    tokens: torch.Tensor, similarity: Similarity
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Relative rows of some tokens by similarity, cut to their largest entries (DeePEn, section 3.2).

    Row n is `softmax(temperature * c)` over the anchors, with `c[a] = cos(E[tokens[n]] - mean,
    E[anchor_ids[a]] - mean)` and, with `normalise`, `c / ||c||_2` in place of `c` (the paper's recipe).

    Args:
        tokens: int64 [N].
        similarity: see `Similarity`.

    Returns:
        columns int32 [N, m] and values float32 [N, m], sorted down, ties to the lower column; rest float32
        [N].

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit, ids outside the embedding, or an
            embedding with NaN or infinite entries. On CUDA this waits for the device: relative rows are
            computed when a map is filled, never inside a decoding step.
    """
    if not isinstance(similarity, Similarity):
        raise InputError(f"similarity must be a Similarity, not {type(similarity).__name__}")
    embedding = similarity.embedding
    check_tensor("embedding", embedding, shape=[None, None], dtype=FLOAT_CODES)
    if embedding.device.type == "cuda":  # on the CPU the core looks at the ids
        _check_ids("token", tokens, len(embedding))
        _check_ids("anchor token", similarity.anchor_ids, len(embedding))
    columns, values, rest, status = launch(tokens, similarity)
    if bool(status.any()):
        token = int(tokens[status.nonzero()[0, 0]])
        raise InputError(f"the embedding of token {token} or of an anchor has NaN or infinite entries")
    return columns, values, rest


def _check_ids(name: str, ids: torch.Tensor, vocab: int) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= vocab:
        raise InputError(f"{name} {low if low < 0 else high} is outside the embedding's {vocab} rows")


def launch(
    tokens: torch.Tensor, similarity: Similarity
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`relative_rows` without looking at the result: its three tensors, and status int32 [N]."""
    embedding, anchor_ids, anchor_inverse_norm, mean, temperature, normalise, entries = similarity
    check_tensor("embedding", embedding, shape=[None, None], dtype=FLOAT_CODES)
    vocab, dim = embedding.shape
    device = embedding.device
    backend = backend_of("relative_rows", device)
    check_tensor("tokens", tokens, shape=[None], dtype=torch.int64, device=device)
    check_tensor("anchor_ids", anchor_ids, shape=[None], dtype=torch.int64, device=device)
    count, anchors = tokens.shape[0], anchor_ids.shape[0]
    check_tensor(
        "anchor_inverse_norm", anchor_inverse_norm, shape=[anchors], dtype=torch.float32, device=device
    )
    if mean is not None:
        check_tensor("mean", mean, shape=[dim], dtype=torch.float32, device=device)
    temperature = real_setting("temperature", temperature)
    entries = whole_setting("entries", entries)
    normalise = true_or_false("normalise", normalise)
    if not 1 <= entries <= anchors:
        raise InputError(f"entries is {entries}; choose 1 to the number of anchors, {anchors}")
    columns, values, rest, status = largest_entries(count, entries, device)
    scratch = workspace(_core.relative_rows_workspace(dim, anchors, entries, count, backend), device)
    _core.relative_rows(
        embedding.data_ptr(),
        FLOAT_CODES[embedding.dtype],
        vocab,
        dim,
        tokens.data_ptr(),
        count,
        anchor_ids.data_ptr(),
        anchors,
        0 if mean is None else mean.data_ptr(),
        anchor_inverse_norm.data_ptr(),
        temperature,
        normalise,
        entries,
        columns.data_ptr(),
        values.data_ptr(),
        rest.data_ptr(),
        status.data_ptr(),
        scratch.data_ptr(),
        backend,
    )
    return columns, values, rest, status
