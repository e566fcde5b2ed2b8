"""Certified skip: the greedy tokens that no assistant can change.

The fuser bounds where each logit may end (`SearchBound`): the search moves a candidate's logit z by at most

    D (z - c) - M .. D (z - c) + M

and leaves any other token's where it was. The main model's first choice z_1 is a candidate, so it stays first
if

    D (z_1 - c) - M > D (z_2 - c) + M    and    D (z_1 - c) - M > z_2 - c.

Both sides are rounded to the logits' dtype, as the fusion rounds what it writes back. Rounding keeps order,
so a tie on one side of it is a tie here, and a tie is not settled.

Processors that give each token a score by its own logit and the ids, rising with the logit, keep order too:
the bounds go through them, all tokens' upper ones with the first choice's lower one among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.decoding.processor_kinds import ORDERLY
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.fusers.search_bound import SearchBound
from deepen_ext.ops.topk_softmax import TopK, launch


class Certificate:
    """Says which rows' greedy tokens are settled by the main model alone."""

    def __init__(self, bound: SearchBound, chooser: Chooser) -> None:
        """For what `chooser` makes of logits that move within these bounds."""
        self._bound = bound
        self._chooser = chooser

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
        if self._chooser.samples(rows[0]) or any(type(one) not in ORDERLY for one in processors):
            return torch.zeros(len(rows), dtype=torch.bool, device=main_logits.device)
        if top is None or top.ids.shape[1] < 2:
            # One read: a sixth of torch.topk's time at 262,144 tokens on the CPU.
            top = launch(main_logits, 2)
        sound = top.status == 0
        first_two = top.ids[:, :2].long().where(sound[:, None], 0)  # the ids of other rows are unspecified
        two, probability = main_logits.gather(1, first_two), top.probs[:, :1]
        if processors:
            limits = self._bound.limits(main_logits, two[:, :1], probability)
            return sound & self._settled_after(main_logits, rows, ids, *limits)
        lower, upper = self._bound.limits(two, two[:, :1], probability)
        return sound & (lower[:, 0] > upper[:, 1])

    def _settled_after(
        self,
        main_logits: torch.Tensor,
        rows: Sequence[int],
        ids: Sequence[Sequence[int]],
        lower: torch.Tensor,
        upper: torch.Tensor,
    ) -> torch.Tensor:
        """`settled` after processors: the first choice at its worst against all others at their best."""
        first = self._chooser.processed(main_logits, rows, ids).argmax(dim=-1, keepdim=True)
        worst = upper.scatter(1, first, lower.gather(1, first))
        scores = self._chooser.processed(worst, rows, ids)
        score = scores.gather(1, first)
        return (score > scores.scatter(1, first, -torch.inf).amax(dim=-1, keepdim=True)).squeeze(1)
