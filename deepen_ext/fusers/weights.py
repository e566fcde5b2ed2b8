"""How much each member counts at a step: by given weights, and by how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import real_number
from deepen_ext.ops.topk_softmax import TopK


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InputError(f"weights is {weights!r}; give a list of numbers, one for each member")
    weights = [real_number("weight", weight, "0 to 1", lambda _: True) for weight in weights]
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights


def confident_weights(weights: torch.Tensor, tops: Sequence[TopK], confidence: float) -> torch.Tensor:
    """Weights of one step, by how sure each member is of its next token.

        w_i = lambda_i exp(-confidence H_i) / sum,    H_i = -sum_t p_i[t] log p_i[t]

    The tail of a top-k counts as k more tokens of one probability: whatever the vocabulary's size, a member
    that knows nothing has about the same entropy.

    Args:
        weights: lambda, float32 [b, n]; a weight of 0 stays 0.
        tops: of each member its k_i most probable tokens, of b rows.
        confidence: for each nat of entropy.

    Returns:
        float32 [b, n], rows summing to 1.
    """
    entropies = torch.stack([_entropy(one) for one in tops], dim=1)
    # A silent member's is no measure for the others: next to its 0 all their weights could underflow.
    entropies = entropies.masked_fill(weights == 0, torch.inf)
    raised = weights * torch.exp(-confidence * (entropies - entropies.amin(dim=1, keepdim=True)))
    return raised / raised.sum(dim=1, keepdim=True)


def _entropy(top: TopK) -> torch.Tensor:
    """In nats, float32 [b]."""
    tail = top.tail.clamp(min=0)
    in_tail = torch.special.entr(tail) + tail * math.log(top.probs.shape[1])
    entropy: torch.Tensor = torch.special.entr(top.probs).sum(dim=-1) + in_tail
    return entropy
