"""What every rule of weighing has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.parts import Said


@dataclass(frozen=True)
class RuleIngredients:
    """What an ensemble knows, for a rule that needs it; `check_weighing` has seen the settings.

    Attributes:
        confidence: the setting, of "confidence".
        gate: the setting, of "gate".
        bridge: makes what looks tokens up in other members' vocabularies.
    """

    confidence: float
    gate: Sequence[float] | None
    bridge: Callable[[], TokenBridge]


class Rule(ABC):
    """Changes the weights of a step, row by row, by what the members say of each row.

    A rule looks at nothing but the step: it has no memory, so that drafts, batches and likelihoods of given
    texts come out the same.

    Attributes:
        name: as users write it.
    """

    name: ClassVar[str]

    @classmethod
    def make(cls, given: RuleIngredients) -> Rule | None:
        """This rule for an ensemble; None where the weights stay as they are."""
        return cls()

    def __str__(self) -> str:
        """Name and numbers, for records of results."""
        return self.name

    @abstractmethod
    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """The weights of a step.

        Args:
            weights: lambda, float32 [b, n], rows summing to 1; 0 where a member sits out.
            said: what the n members say of the b rows, the main model first.

        Returns:
            float32 [b, n], rows summing to 1. A weight of 0 stays 0.
        """


def scaled(weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Weights times factors [b, n] of 0 or more, summing to 1 again; rows that have nothing left stay."""
    raised = weights * factors
    total = raised.sum(dim=1, keepdim=True)
    return torch.where(total > 0, raised / total, weights)
