"""Log-probabilities of one token a row, from whole logits."""

from __future__ import annotations

import torch

from deepen_ext.ops.topk_softmax import topk_softmax


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, *, name: str = "logits"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the softmax of each row gives one token, and the row's most probable token.

    Args:
        logits: float32, float16 or bfloat16 [n, V], contiguous. -inf is probability 0.
        tokens: int64 [n], on the same device.
        name: what to call the logits in an error.

    Returns:
        natural logarithms, float64 [n], and the most probable ids, int32 [n], ties to the lower id. Both wait
        for the device.

    Raises:
        InputError: a row with NaN, +inf or nothing but -inf; see `topk_softmax`.
    """
    top = topk_softmax(logits, 1, name=name)
    top.check(name)
    # From the largest logit and its probability, whose sum the operation takes in float64.
    own, best = (logits.gather(1, ids).double() for ids in (tokens[:, None], top.ids.long()))
    return (own - best + top.probs.double().log())[:, 0], top.ids[:, 0]
