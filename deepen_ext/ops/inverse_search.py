"""`inverse_search`: see csrc/ops/inverse_search.h."""

from __future__ import annotations

import torch

from deepen_ext import _core
from deepen_ext.ops.checks import backend_of, check_tensor, real_setting, whole_setting, workspace
from deepen_ext.ops.rows import RelativeRows, check_rows


def inverse_search(
    logits: torch.Tensor,
    ids: torch.Tensor,
    tail_logit: torch.Tensor,
    target: torch.Tensor,
    rows: RelativeRows,
    *,
    learning_rate: float,
    steps: int = 5,
) -> torch.Tensor:
    """Move the candidates' logits so that their relative representation nears the target (DeePEn, 3.4).

    `steps` AdamW steps on `KL(target || softmax(z) R) / A`; tokens that are no candidates keep their summed
    `tail_logit`, with a uniform relative row.

    Args:
        logits: float32 [B, K], the candidates' logits.
        ids: int32 [B, K], their token ids.
        tail_logit: float32 [B], log of the summed exp(logit) of all other tokens; -inf if there are none.
        target: float32 [B, A], each batch row sums to 1.
        rows: the main model's relative rows.
        learning_rate: AdamW's, above 0 to 10.
        steps: 0 to 64.

    Returns:
        float32 [B, K], the new logits.

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit, and on the CPU ids outside the
            relative rows or columns that are no anchors. On CUDA nothing waits for the device: such a
            candidate's logit is NaN, and a relative row ends before such a column.
    """
    check_tensor("logits", logits, shape=[None, None], dtype=torch.float32)
    batch, candidates = logits.shape
    device = logits.device
    backend = backend_of("inverse_search", device)
    check_tensor("ids", ids, shape=[batch, candidates], dtype=torch.int32, device=device)
    check_tensor("tail_logit", tail_logit, shape=[batch], dtype=torch.float32, device=device)
    check_rows("rows", rows, device)
    check_tensor("target", target, shape=[batch, rows.anchors], dtype=torch.float32, device=device)
    learning_rate = real_setting("learning_rate", learning_rate)
    steps = whole_setting("steps", steps)
    found = torch.empty_like(logits)
    packed = rows.pack()
    scratch = workspace(
        _core.inverse_search_workspace(packed, batch, candidates, rows.anchors, backend), device
    )
    _core.inverse_search(
        logits.data_ptr(),
        ids.data_ptr(),
        tail_logit.data_ptr(),
        target.data_ptr(),
        packed,
        batch,
        candidates,
        rows.anchors,
        learning_rate,
        steps,
        found.data_ptr(),
        scratch.data_ptr(),
        backend,
    )
    return found
