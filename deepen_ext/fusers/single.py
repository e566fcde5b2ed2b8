"""The main model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.parts import FusedStep, Part, Said


class SingleFuser(Fuser):
    """The main model alone, on the same loop: what every ensemble is compared with."""

    name: ClassVar[str] = "single"
    fewest_members: ClassVar[int] = 1
    main_needs_logits: ClassVar[bool] = False

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """Nothing to fuse."""
        return said[0].topk.ids[:, 0]

    def step_parts(
        self,
        parts: Sequence[Part],
        weights: Sequence[float] | Sequence[Sequence[float]],
    ) -> FusedStep:
        """The main model's logits as they are."""
        choice = parts[0].topk.ids[:, 0]
        return FusedStep(parts[0].said.scores(), choice, choice, tuple(parts[:1]))

    def likelihoods(
        self,
        parts: Sequence[Part],
        weights: Sequence[float] | Sequence[Sequence[float]],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """See `Fuser.likelihoods`."""
        return self._alone(parts[0], tokens)
