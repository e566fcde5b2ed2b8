"""A member counts more where it is sure of its next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.evidence import entropies
from deepen_ext.fusers.weighing.rule import Rule, RuleIngredients


class Confidence(Rule):
    """``w_i = lambda_i exp(-kappa H_i) / sum``, H the entropy of what a member says, in nats."""

    name: ClassVar[str] = "confidence"

    def __init__(self, kappa: float) -> None:
        """Kappa is for each nat of entropy, above 0."""
        self.kappa = kappa

    @classmethod
    def make(cls, given: RuleIngredients) -> Confidence | None:
        """See `Rule.make`."""
        return cls(given.confidence) if given.confidence else None

    def __str__(self) -> str:
        return f"{self.name} {self.kappa:g}"

    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """See `Rule.weigh`."""
        # A silent member's is no measure for the others: next to its 0 all their weights could underflow.
        entropy = entropies(said).masked_fill(weights == 0, torch.inf)
        raised = weights * torch.exp(-self.kappa * (entropy - entropy.amin(dim=1, keepdim=True)))
        return raised / raised.sum(dim=1, keepdim=True)
