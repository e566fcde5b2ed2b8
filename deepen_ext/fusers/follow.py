"""Each text follows whoever counts most: the search where that is the main model, else the wide average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from deepen_ext.fusers.deepen import DeepenFuser
from deepen_ext.fusers.ingredients import Ingredients
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.search_bound import SearchBound
from deepen_ext.fusers.union_vocab import UnionVocabFuser
from deepen_ext.space.relative_map import RelativeMap

if TYPE_CHECKING:
    from typing_extensions import Self


class FollowFuser(UnionVocabFuser):
    """`deepen` in rows where the main model has the largest weight, `union-vocab` in the others.

    The search moves the main model's logits by a bounded step. That protects a main model that is the best
    reader, and holds back one that is not. The average has no bound, so it can follow a better assistant as
    far as that goes. Weights that differ by text, as those from the prompt do, make the choice.
    """

    name: ClassVar[str] = "follow"
    uses_maps: ClassVar[bool] = True
    uses_recipe: ClassVar[bool] = True
    first_end_needs_all: ClassVar[bool] = True

    _search: DeepenFuser
    maps: list[RelativeMap]
    learning_rate: float
    steps: int
    min_probability: float
    log_probs: bool

    @classmethod
    def make(cls, given: Ingredients) -> Self:
        """See `Fuser.make`."""
        fuser = super().make(given)
        search = fuser._search = DeepenFuser.make(given)
        # Records of results tell fusers apart by these.
        fuser.maps, fuser.learning_rate, fuser.steps = search.maps, search.learning_rate, search.steps
        fuser.min_probability, fuser.log_probs = search.min_probability, search.log_probs
        return fuser

    def search_bound(self) -> SearchBound:
        """See `Fuser.search_bound`; of texts that `bounded` names."""
        return self._search.search_bound()

    def bounded(self, weights: Sequence[float]) -> bool:
        """Where the main model leads by these weights, it leads whoever sits out; a rule may change that."""
        return self.rule is None and weights[0] >= max(weights[1:])

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`. On CUDA both are computed for every row, so that nothing waits for the device."""
        leads = _leads(weights)
        host = leads.device.type == "cpu"
        if host and bool(leads.all()):
            return self._search.fuse(logits, said, weights)
        if host and not bool(leads.any()):
            return super().fuse(logits, said, weights)
        searched = logits.clone()
        first = self._search.fuse(searched, said, weights)
        chosen = torch.where(leads, first, super().fuse(logits, said, weights))
        logits.copy_(torch.where(leads[:, None], searched, logits))
        return chosen

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Fuser.logprobs`."""
        leads = _leads(weights)
        searched = self._search.logprobs(said, weights, tokens)
        return torch.where(leads, searched, super().logprobs(said, weights, tokens))


def _leads(weights: torch.Tensor) -> torch.Tensor:
    """Rows in which the main model has the largest weight, bool [b]."""
    return weights[:, 0] >= weights[:, 1:].amax(dim=1)
