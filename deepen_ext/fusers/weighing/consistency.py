"""CoRE's weights of models: how sure each is, the main model never less than the others together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.evidence import entropies
from deepen_ext.fusers.weighing.rule import Rule, scaled

_LEAST = 1e-6  # nats


class Consistency(Rule):
    """``w_i = lambda_i / H_i``, and the main model's at least half of the whole.

    The part of CoRE (Zeng et al., arXiv 2510.13855) that weighs models, as its authors have it for choices.
    Its other part, which weighs tokens, is the fuser "consistent".
    """

    name: ClassVar[str] = "consistency"

    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """See `Rule.weigh`."""
        return anchored(scaled(weights, 1 / entropies(said).clamp(min=_LEAST)))


def anchored(weights: torch.Tensor) -> torch.Tensor:
    """Rows in which the main model, where it speaks, has at least as much as all others together."""
    main = weights[:, :1]
    least = torch.where(main > 0, main.clamp(min=0.5), main)
    others = weights[:, 1:]
    total = others.sum(dim=1, keepdim=True)
    return torch.cat([least, torch.where(total > 0, others * (1 - least) / total, others)], dim=1)
