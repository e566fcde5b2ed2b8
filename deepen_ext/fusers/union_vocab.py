"""GaC: the average over the union of the members' vocabularies (Yu et al., arXiv 2406.12585)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch

from deepen_ext.fusers.mapped import MappedFuser
from deepen_ext.fusers.parts import Said


class UnionVocabFuser(MappedFuser):
    """``q = sum_i w_i p_i`` over all byte strings that are a token of some member.

    GaC writes the union's most probable token whole. Here the text is made of the main model's tokens, so a
    token that it does not have counts for the one its text begins with: what comes out is the distribution of
    the next token of the main model under q. Special tokens other than EOS stay their own member's.
    """

    name: ClassVar[str] = "union-vocab"

    @cached_property
    def _sorted(self) -> list[torch.return_types.sort]:
        """Of each assistant: the main model's tokens in order, and for each one of the assistant's tokens."""
        return [table.sort() for table in self.tables]

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`."""
        fused = said[0].probabilities().mul_(weights[:, :1])
        for i, one in enumerate(said[1:], start=1):
            self.add_mapped(fused, one, weights[:, i : i + 1])
        logits.copy_(fused.log_())
        return logits.argmax(dim=-1).int()

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Fuser.logprobs`. Of an assistant, the tokens are needed that count for the main model's."""
        rows = torch.arange(len(tokens), device=self.device)
        found, total = weights[:, 0] * said[0].logprobs(rows, tokens).exp(), weights[:, 0].double()
        for i, one in enumerate(said[1:], start=1):
            targets, sources = self._sorted[one.member - 1]
            begins, ends = (torch.searchsorted(targets, tokens, right=right) for right in (False, True))
            counts = ends - begins
            own = rows.repeat_interleave(counts)
            nth = torch.arange(len(own), device=self.device) - (counts.cumsum(0) - counts)[own]
            probs = one.logprobs(own, sources[begins[own] + nth]).exp()
            found.index_add_(0, own, weights[own, i] * probs)
            nowhere = sources[: int(torch.searchsorted(targets, 0))]
            total += weights[:, i] * (1 - one.logprobs(rows[:, None], nowhere).exp().sum(dim=1))
        return (found / total).log()
