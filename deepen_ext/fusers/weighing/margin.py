"""A member counts by how far its first choice is ahead of its second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.evidence import margins
from deepen_ext.fusers.weighing.rule import Rule, scaled

_LEAST = 1e-3  # of a margin, so that two equally probable tokens do not silence a member


class Margin(Rule):
    """``w_i = lambda_i (p_i[1] - p_i[2]) / sum``, probabilities of a member's two most probable tokens."""

    name: ClassVar[str] = "margin"

    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """See `Rule.weigh`."""
        return scaled(weights, margins(said).clamp(min=_LEAST))
