"""A small gate, fitted on dev texts: four numbers say what makes a member count more at a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.weighing.evidence import Agreement, entropies, margins
from deepen_ext.fusers.weighing.rule import Rule, RuleIngredients, scaled

GATE_NUMBERS = 4


class Gate(Rule):
    """``w_i = lambda_i exp(g . x_i) / sum``; x_i is what can be seen of member i at the token.

    x_i has four numbers: the entropy of what the member says in nats, the probability of its first choice
    less that of its second, 1 where its first choice is the main model's (or begins with it), and 1 for the
    main model. `deepen_ext.measure.tuning.fit_gate` finds g. With g = (-kappa, 0, 0, 0) it is `Confidence`.
    """

    name: ClassVar[str] = "gate"

    def __init__(self, gate: Sequence[float], bridge: TokenBridge) -> None:
        """Take g, four numbers."""
        self.gate = list(gate)
        self._agree = Agreement(bridge)

    @classmethod
    def make(cls, given: RuleIngredients) -> Gate:
        """See `Rule.make`."""
        assert given.gate is not None
        return cls(given.gate, given.bridge())

    def __str__(self) -> str:
        return f"{self.name} {self.gate}"

    def features(self, said: Sequence[Said]) -> torch.Tensor:
        """x, float32 [b, n, 4]."""
        ahead = margins(said)
        main = torch.zeros_like(ahead)
        main[:, 0] = 1
        return torch.stack([entropies(said), ahead, self._agree(said).to(ahead.dtype), main], dim=-1)

    def weigh(self, weights: torch.Tensor, said: Sequence[Said]) -> torch.Tensor:
        """See `Rule.weigh`."""
        features = self.features(said)
        score = sum(number * features[..., i] for i, number in enumerate(self.gate))
        assert isinstance(score, torch.Tensor)
        score = score.masked_fill(weights == 0, -torch.inf)
        return scaled(weights, torch.exp(score - score.amax(dim=1, keepdim=True)))
