"""What every fuser needs that brings whole distributions into the main model's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.ingredients import Common, Ingredients
from deepen_ext.fusers.parts import Said

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class MappedFuser(Fuser):
    """Knows for every token of every assistant the main model's token that it counts for (`TokenBridge`)."""

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        bridge: TokenBridge,
        device: torch.device,
        **common: Unpack[Common],
    ) -> None:
        """Look up every token of every assistant, some seconds for a large vocabulary."""
        super().__init__(vocab_sizes, device, **common)
        # int64 [V_i] of each assistant; -1 for a token that counts for none.
        self.tables = [bridge.table(member, 0).to(device) for member in range(1, len(vocab_sizes))]

    @classmethod
    def make(cls, given: Ingredients) -> Self:
        """See `Fuser.make`."""
        return cls(given.vocab_sizes, given.bridge(), given.device, **given.common)

    def mapped(self, said: Said) -> torch.Tensor:
        """What an assistant says, in the main model's tokens, float32 [b, V_main]; 0 where it is silent."""
        table = self.tables[said.member - 1]
        mass = said.probabilities() * (table >= 0)
        return mass.new_zeros(len(mass), self.vocab_sizes[0]).index_add_(1, table.clamp(min=0), mass)
