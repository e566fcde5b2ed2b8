"""CoRE's tokens: an assistant's probability counts less where it is far from what all say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.mapped import MappedFuser
from deepen_ext.fusers.parts import Said

BETA = 2.0  # as the authors have it


class ConsistentFuser(MappedFuser):
    """``q = w_0 p_0 + sum_i w_i s_i q_i``, normalised; q_i is what `union-vocab` makes of member i.

    s_i falls from 1 to 0 with the distance d of q_i[t] from the mean of all: ``(exp(-beta d) - exp(-beta)) /
    (1 - exp(-beta))``, the "rbf" form of CoRE (Zeng et al., arXiv 2510.13855). With weighing="consistency"
    members are weighed as there, too.
    """

    name: ClassVar[str] = "consistent"

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`."""
        speaks = weights > 0
        each = [said[0].probabilities(), *map(self.mapped, said[1:])]
        mean = sum(one * speaks[:, i : i + 1] for i, one in enumerate(each)) / speaks.sum(dim=1, keepdim=True)
        fused = each[0] * weights[:, :1]
        for i, one in enumerate(each[1:], start=1):
            near = (torch.exp(-BETA * (one - mean).abs()) - math.exp(-BETA)) / (1 - math.exp(-BETA))
            fused += one * near * weights[:, i : i + 1]
        logits.copy_(fused.log())
        return logits.argmax(dim=-1).int()
