"""Certified skip: the greedy tokens that no assistant can change.

AdamW bounds every step of the inverse search, whatever the gradients are. With

    a_i = (1 - b1) b1^(t-i) / (1 - b1^t),    b_i = (1 - b2) b2^(t-i) / (1 - b2^t)

the moments of step t = 1..T are m = sum_i a_i g_i and v = sum_i b_i g_i^2, so by Cauchy and Schwarz

    |m| / (sqrt(v) + eps) <= c_t = sqrt(sum_i a_i^2 / b_i).

(Gradients that grow by b2/b1 a step reach c_t at every step at once: nothing is given away.) Weight decay
first scales what moves by k_t = 1 - 0.01 eta_t. That is the logit z less c, the logarithm of the sum of all
exponentials (in the paper's recipe z itself, c = 0). After T steps a candidate's z - c lies within

    D (z - c) - M .. D (z - c) + M,    D = prod_t k_t,    M = sum_t eta_t c_t prod_{s>t} k_s

and any other token's where it was. The main model's first choice z_1 is a candidate, so it stays first if

    D (z_1 - c) - M > D (z_2 - c) + M    and    D (z_1 - c) - M > z_2 - c.

Floating point: M gets a ten-thousandth more (the float32 moments, the rounded b1 and b2), each bound 3 T + 8
rounding errors of z - c, and with c above 0 or below it 4 of z and of z_1, through whose difference z - c is
found and undone. Then both sides are rounded to the logits' dtype, as the fusion rounds what it writes back.
Rounding keeps order, so a tie on one side of it is a tie here, and a tie is not settled.

Processors that give each token a score by its own logit and the ids, rising with the logit, keep order too:
the bounds go through them, all tokens' upper ones with the first choice's lower one among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers.generation import logits_process

from deepen_ext.decoding.sampler import Chooser
from deepen_ext.ops.topk_softmax import TopK, launch

# Score by score, rising (or constant), without a state that a second call would change. Not among them:
# ExponentialDecayLengthPenalty, which may fall with a negative logit, and what looks at all scores.
_ORDERLY = {
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
}

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


class Certificate:
    """Says which rows' greedy tokens are settled by the main model alone."""

    def __init__(self, learning_rate: float, steps: int, chooser: Chooser, *, log_probs: bool = True) -> None:
        """Bound the search of these settings (`DeepenFuser`), for what `chooser` makes of its logits."""
        self._decay, reach = movement(learning_rate, steps)
        self._reach = reach * (1 + 1e-4)
        self._rounding = (3 * steps + 8) * _ROUNDING
        self._chooser = chooser
        self._log_probs = log_probs

    def settled(
        self,
        main_logits: torch.Tensor,
        rows: Sequence[int],
        ids: Sequence[Sequence[int]],
        *,
        top: TopK | None = None,
    ) -> torch.Tensor:
        """Where the chosen token is the main model's own (after processors), whatever the target.

        Nothing waits for the device. A row with NaN or of -inf alone is not settled, so that the fusion step
        reports it; nor is any row when something is drawn, or when a processor does not keep order.

        Args:
            main_logits: [b, V], float32, float16 or bfloat16.
            rows: which rows they are of.
            ids: of each of them, prompt and new tokens so far.
            top: the largest of them, if they are known: `ops.topk_softmax`, k 2 or more.

        Returns:
            bool [b], where the logits are.
        """
        processors = self._chooser.processors(rows[0])
        if self._chooser.settings.do_sample or any(type(one) not in _ORDERLY for one in processors):
            return torch.zeros(len(rows), dtype=torch.bool, device=main_logits.device)
        if top is None or top.ids.shape[1] < 2:
            top = launch(
                main_logits, 2
            )  # one read; a sixth of torch.topk's time at 262,144 tokens on the CPU
        sound = top.status == 0
        first_two = top.ids[:, :2].long().where(sound[:, None], 0)  # the ids of other rows are unspecified
        origin = self._origin(main_logits, first_two[:, :1], top.probs[:, :1])
        if processors:
            return sound & self._settled_after(main_logits, rows, ids, origin)
        lower, upper = self._bounds(main_logits.gather(1, first_two), *origin)
        return sound & (lower[:, 0] > upper[:, 1])

    def _settled_after(
        self,
        main_logits: torch.Tensor,
        rows: Sequence[int],
        ids: Sequence[Sequence[int]],
        origin: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """`settled` after processors: the first choice at its worst against all others at their best."""
        first = self._chooser.processed(main_logits, rows, ids).argmax(dim=-1, keepdim=True)
        lower, upper = self._bounds(main_logits, *origin)
        worst = upper.scatter(1, first, lower.gather(1, first))
        scores = self._chooser.processed(worst, rows, ids)
        score = scores.gather(1, first)
        return (score > scores.scatter(1, first, -torch.inf).amax(dim=-1, keepdim=True)).squeeze(1)

    def _origin(
        self, logits: torch.Tensor, first: torch.Tensor, probability: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first choice's logit, and what the search has for it (csrc/ops/fuse.h), [b, 1]."""
        logit = logits.gather(1, first).float()
        return (logit, probability.log()) if self._log_probs else (torch.zeros_like(logit),) * 2

    def _bounds(
        self, logits: torch.Tensor, origin: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each logit may end, in its dtype: as a candidate it moves, otherwise it stays."""
        z = logits.float()
        searched = z - origin + value
        decayed, moved = searched * self._decay, searched.abs() * self._rounding + self._reach
        if self._log_probs:
            moved = moved + 4 * _ROUNDING * (z.abs() + origin.abs())
        lower = torch.minimum(decayed - moved - value + origin, z)
        upper = torch.maximum(decayed + moved - value + origin, z).masked_fill(z == -torch.inf, -torch.inf)
        return lower.to(logits.dtype), upper.to(logits.dtype)
