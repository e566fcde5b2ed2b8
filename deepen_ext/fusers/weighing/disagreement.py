"""The main model writes alone where members agree, or where one of them is sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.evidence import Agreement
from deepen_ext.fusers.weighing.rule import Rule, RuleIngredients

SURE = 0.5  # of a first choice: no other token can then be more probable


class Disagreement(Rule):
    """The weights as given where first choices differ and none has a probability of `SURE`; else main's is 1.

    SAFE (Yun et al., arXiv 2510.15346) fuses at such places alone: there a change can help, and elsewhere it
    can only harm. Its sharpening of the fused distribution is not here.
    """

    name: ClassVar[str] = "disagreement"

    def __init__(self, bridge: TokenBridge) -> None:
        self._agree = Agreement(bridge)

    @classmethod
    def make(cls, given: RuleIngredients) -> Disagreement:
        """See `Rule.make`."""
        return cls(given.bridge())

    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """See `Rule.weigh`."""
        speaks = weights > 0
        sure = torch.stack([one.topk.probs[:, 0] >= SURE for one in said], dim=1)
        fused = (speaks & ~self._agree(said)).any(dim=1) & ~(speaks & sure).any(dim=1)
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1
        return torch.where((fused | ~speaks[:, 0])[:, None], weights, alone)
