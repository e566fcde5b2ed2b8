"""transformers' top-p warper on the CPU, without sorting the vocabulary.

The warper sorts every row: 4 ms for 49,152 tokens and 19 ms for 151,936 (one core), more than all else of
sampling. The tokens that stay are few, and mostly among the first `_FIRST`; `topk` finds these in 0.3 ms.
"""

from __future__ import annotations

from typing import cast

import torch
from transformers import TopPLogitsWarper

_FIRST = 256
_ROUNDING = 1e-6  # more than two float32 sums of a row's probabilities differ by


def top_p(warper: TopPLogitsWarper, scores: torch.Tensor) -> torch.Tensor:
    """What the warper gives for scores float32 [b, V]; no row depends on the others.

    A token stays where the more probable ones sum to less than p (Holtzman et al., arXiv 1904.09751). The
    warper itself does the rows in which the first tokens are not enough, in which the sum at some token is p
    up to rounding, and in which the last token that stays and the next have equal scores.
    """
    ids = torch.LongTensor()  # the warper does not look at them
    if scores.shape[1] <= _FIRST:
        return cast("torch.Tensor", warper(ids, scores))
    values, tokens = scores.topk(_FIRST)
    probs = torch.softmax(scores, dim=-1).gather(1, tokens).double()
    sums = probs.cumsum(dim=-1)
    stays = sums - probs < warper.top_p
    stays[:, : warper.min_tokens_to_keep] = True
    end = stays.sum(dim=-1, keepdim=True).clamp(max=_FIRST - 1)
    unsure = (sums - warper.top_p).abs().amin(dim=-1) < _ROUNDING
    unsure |= sums[:, -1] < warper.top_p
    unsure |= (values.gather(1, end - 1) == values.gather(1, end)).squeeze(1)
    found = torch.full_like(scores, warper.filter_value)
    found.scatter_(1, tokens, values.masked_fill(~stays, warper.filter_value))
    rows = unsure.nonzero().flatten()
    if len(rows):
        found[rows] = warper(ids, scores[rows])
    return found
