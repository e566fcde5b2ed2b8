"""How far the inverse search can move a logit, whatever the assistants say.

AdamW bounds every step of the inverse search, whatever the gradients are. With

    a_i = (1 - b1) b1^(t-i) / (1 - b1^t),    b_i = (1 - b2) b2^(t-i) / (1 - b2^t)

the moments of step t = 1..T are m = sum_i a_i g_i and v = sum_i b_i g_i^2, so by Cauchy and Schwarz

    |m| / (sqrt(v) + eps) <= c_t = sqrt(sum_i a_i^2 / b_i).

(Gradients that grow by b2/b1 a step reach c_t at every step at once: nothing is given away.) Weight decay
first scales what moves by k_t = 1 - 0.01 eta_t. That is the logit z less c, the logarithm of the sum of all
exponentials (in the paper's recipe z itself, c = 0). After T steps a candidate's z - c lies within

    D (z - c) - M .. D (z - c) + M,    D = prod_t k_t,    M = sum_t eta_t c_t prod_{s>t} k_s

and any other token's where it was.

Floating point: M gets a ten-thousandth more (the float32 moments, the rounded b1 and b2), each bound 3 T + 8
rounding errors of z - c, and with c above 0 or below it 4 of z and of z_1, the first choice's logit, through
whose difference z - c is found and undone. Then both bounds are rounded to the logits' dtype, as the fusion
rounds what it writes back. Rounding keeps order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# The optimiser of csrc/ops/adamw.h.
_BETA1, _BETA2, _WEIGHT_DECAY, _COSINE_PERIOD = 0.9, 0.999, 0.01, 10
_ROUNDING = 2.0**-24  # of float32


def movement(learning_rate: float, steps: int) -> tuple[float, float]:
    """(D, M) of the inverse search: a candidate's logit z ends within D z - M .. D z + M."""
    decay, reach = 1.0, 0.0
    for step in range(steps):
        lowest = learning_rate / 4
        eta = lowest + (learning_rate - lowest) * (1 + math.cos(math.pi * step / _COSINE_PERIOD)) / 2
        keep = 1 - _WEIGHT_DECAY * eta
        decay, reach = decay * keep, reach * keep + eta * _largest_ratio(step + 1)
    return decay, reach


def _largest_ratio(t: int) -> float:
    """c_t, the largest |m| / sqrt(v) of step t, counted from 1."""
    first, second = (1 - _BETA1) / (1 - _BETA1**t), (1 - _BETA2) / (1 - _BETA2**t)
    return math.sqrt(sum((first * _BETA1**i) ** 2 / (second * _BETA2**i) for i in range(t)))


@dataclass(frozen=True)
class SearchBound:
    """Where a logit may be after the inverse search.

    Attributes:
        decay: D.
        reach: M, with what floating point adds.
        rounding: the share of z - c by which the float32 sums may be off.
        log_probs: whether the search runs on log-probabilities; False: on the logits as they are, c = 0.
    """

    decay: float
    reach: float
    rounding: float
    log_probs: bool

    @classmethod
    def of(cls, learning_rate: float, steps: int, *, log_probs: bool) -> SearchBound:
        """The bound of a search with these settings (see `DeepenFuser`)."""
        decay, reach = movement(learning_rate, steps)
        return cls(decay, reach * (1 + 1e-4), (3 * steps + 8) * _ROUNDING, log_probs)

    def limits(
        self, logits: torch.Tensor, first: torch.Tensor, probability: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest value that each logit may end at: a candidate moves, any other stays.

        Args:
            logits: z [b, n] of any n tokens, float32, float16 or bfloat16.
            first: z_1 [b, 1] of the first choice, in the same dtype.
            probability: float32 [b, 1], the first choice's.

        Returns:
            [b, n] each, in the logits' dtype; -inf stays -inf.
        """
        z = logits.float()
        # The first choice's logit, and what the search has in its place (csrc/ops/fuse.h).
        origin, value = first.float(), probability.log()
        if not self.log_probs:
            origin = value = torch.zeros_like(origin)
        searched = z - origin + value
        decayed, moved = searched * self.decay, searched.abs() * self.rounding + self.reach
        if self.log_probs:
            moved = moved + 4 * _ROUNDING * (z.abs() + origin.abs())
        lower = torch.minimum(decayed - moved - value + origin, z)
        upper = torch.maximum(decayed + moved - value + origin, z).masked_fill(z == -torch.inf, -torch.inf)
        return lower.to(logits.dtype), upper.to(logits.dtype)
