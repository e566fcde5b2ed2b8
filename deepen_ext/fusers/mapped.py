"""What every fuser needs that brings whole distributions into the main model's vocabulary."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from deepen_ext.fusers.bridged import BridgedFuser
from deepen_ext.fusers.ingredients import Ingredients
from deepen_ext.fusers.parts import Said

if TYPE_CHECKING:
    from typing_extensions import Self


class MappedFuser(BridgedFuser):
    """Knows for every token of every assistant the main model's token that it counts for (`TokenBridge`)."""

    @classmethod
    def make(cls, given: Ingredients) -> Self:
        """On CUDA the tables are made here, so that no step waits; on the CPU when they are needed."""
        fuser = super().make(given)
        if fuser.device.type == "cuda":
            _ = fuser._targets
        return fuser

    @cached_property
    def tables(self) -> list[torch.Tensor]:
        """Of each assistant int64 [V_i], on the fusing device; -1 for a token that counts for none.

        Every token of every assistant is looked up: some seconds for a large vocabulary.
        """
        members = range(1, len(self.vocab_sizes))
        return [self._bridge.table(member, 0).to(self.device) for member in members]

    @cached_property
    def _targets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`tables` with 0 for a token that counts for none, and the ids of those tokens."""
        return [(table.clamp(min=0), (table < 0).nonzero().flatten()) for table in self.tables]

    def mapped(self, said: Said) -> torch.Tensor:
        """What an assistant says, in the main model's tokens, float32 [b, V_main]; 0 where it is silent."""
        shape = len(said.topk.probs), self.vocab_sizes[0]
        found = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.add_mapped(found, said, 1.0)
        return found

    def add_mapped(self, found: torch.Tensor, said: Said, weights: torch.Tensor | float) -> None:
        """The same times `weights`, one number or [b, 1], added to `found` [b, V_main] in place."""
        table, nowhere = self._targets[said.member - 1]
        found.index_add_(1, table, said.probabilities().index_fill_(1, nowhere, 0).mul_(weights))
