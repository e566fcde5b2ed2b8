"""The product of experts: the geometric mean of what the members say, in the main model's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.mapped import MappedFuser
from deepen_ext.fusers.parts import Said

_FLOOR = 1e-4  # share of the main model's own distribution in each assistant's


class ProductFuser(MappedFuser):
    """``log p = sum_i w_i log q_i``, normalised; q_i is what `union-vocab` makes of member i.

    Hinton's product of experts (2002); of language models with different vocabularies it is reported best for
    JSON and SQL (arXiv 2603.05432). A token that some assistant has no text for would be impossible, so each
    q_i has a ten-thousandth of the main model's distribution in it.
    """

    name: ClassVar[str] = "product"

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`."""
        main = said[0].probabilities()
        # w log q, and 0 where w is 0: of a member that sits out q may be 0, and the floor too small a number.
        mean = torch.special.xlogy(weights[:, :1], main)
        for i, one in enumerate(said[1:], start=1):
            mean += torch.special.xlogy(weights[:, i : i + 1], self.mapped(one) + _FLOOR * main)
        logits.copy_(mean.masked_fill(main == 0, -torch.inf))
        return logits.argmax(dim=-1).int()
