"""`fuse`: see csrc/ops/fuse.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from deepen_ext import _core
from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import true_or_false
from deepen_ext.ops.checks import (
    FLOAT_CODES,
    backend_of,
    check_tensor,
    real_setting,
    whole_setting,
    workspace,
)
from deepen_ext.ops.rows import RelativeRows
from deepen_ext.ops.topk_softmax import TopK

MOST_MEMBERS = 16  # kMaxMembers of csrc/ops/fuse.h


class FuseInput(NamedTuple):
    """One member's part of a fusion step: its top-k tokens and its relative rows."""

    topk: TopK
    rows: RelativeRows


def fuse(
    logits: torch.Tensor,
    members: Sequence[FuseInput],
    weights: torch.Tensor,
    *,
    learning_rate: float,
    steps: int = 5,
    min_probability: float = 0.0,
    log_probs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One DeePEn step for each batch row, written into the main model's logits in place.

    Args:
        logits: float32, float16 or bfloat16 [B, V_main], contiguous. The candidates' logits are replaced.
        members: top-k tokens and relative rows of each member, the main model first.
        weights: float32 [B, n], each batch row sums to 1. A weight of 0 leaves a member out of that batch
            row. Where the main model alone has a weight there is no gradient: its candidates move by rounding
            noise, which AdamW makes as large as the learning rate.
        learning_rate: AdamW's, above 0 to 10.
        steps: 0 to 64.
        min_probability: tokens less probable than this count as part of their member's tail.
        log_probs: the search runs on the main model's log-probabilities, so that a constant added to its
            logits changes nothing; the result is written back in the logits' own frame. False: on the logits
            as they are, as in the paper: what weight decay does to the candidates, but not to the other
            tokens, then depends on the constant.

    Returns:
        fused float32 [B, K], the candidates' new logits in the order of `members[0].topk.ids`, and chosen
        int32 [B], the argmax of the new logits.

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit, `logits` in the memory of another
            tensor given, and on the CPU token ids outside a member's relative rows, columns that are no
            anchors, or weights that are negative, not finite or do not sum to 1. On CUDA nothing waits for
            the device: such tokens and entries are left out, a candidate's fused logit is NaN, and weights
            are taken as they are.
    """
    if not members:
        raise InputError("there are no members to fuse")
    for i, one in enumerate(members):
        if (
            not isinstance(one, FuseInput)
            or not isinstance(one.topk, TopK)
            or not isinstance(one.rows, RelativeRows)
        ):
            raise InputError(f"member {i} must be a FuseInput of TopK and RelativeRows")
    main = members[0]
    check_tensor("ids of member 0", main.topk.ids, shape=[None, None], dtype=torch.int32)
    main.rows.check("rows of member 0", main.topk.ids.device)
    batch = main.topk.ids.shape[0]
    check_tensor("logits", logits, shape=[batch, main.rows.values.shape[0]], dtype=FLOAT_CODES)
    device = logits.device
    backend = backend_of("fuse", device)
    check_tensor("weights", weights, shape=[batch, len(members)], dtype=torch.float32, device=device)
    learning_rate = real_setting("learning_rate", learning_rate)
    min_probability = real_setting("min_probability", min_probability)
    steps = whole_setting("steps", steps)
    log_probs = true_or_false("log_probs", log_probs)
    packed = []
    for i, (topk, rows) in enumerate(members):
        if rows is not main.rows:
            rows.check(f"rows of member {i}", device)
        if rows.anchors != main.rows.anchors:
            raise InputError(
                f"member {i} has {rows.anchors} anchors, but the main model has {main.rows.anchors}"
            )
        check_tensor(f"ids of member {i}", topk.ids, shape=[batch, None], dtype=torch.int32, device=device)
        k = topk.ids.shape[1]
        check_tensor(f"probs of member {i}", topk.probs, shape=[batch, k], dtype=torch.float32, device=device)
        check_tensor(f"tail of member {i}", topk.tail, shape=[batch], dtype=torch.float32, device=device)
        packed.append((topk.ids.data_ptr(), topk.probs.data_ptr(), topk.tail.data_ptr(), k, rows.pack()))

    k = main.topk.ids.shape[1]
    fused = torch.empty(batch, k, dtype=torch.float32, device=device)
    chosen = torch.empty(batch, dtype=torch.int32, device=device)
    scratch = workspace(_core.fuse_workspace(packed[0][4], batch, k, main.rows.anchors, backend), device)
    _core.fuse(
        packed,
        weights.data_ptr(),
        logits.data_ptr(),
        FLOAT_CODES[logits.dtype],
        batch,
        main.rows.anchors,
        learning_rate,
        steps,
        min_probability,
        log_probs,
        fused.data_ptr(),
        chosen.data_ptr(),
        scratch.data_ptr(),
        backend,
    )
    return fused, chosen
