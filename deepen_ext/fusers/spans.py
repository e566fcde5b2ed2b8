"""AdaFuse: words that members propose and all of them score (Cui et al., arXiv 2601.06022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.ingredients import Common, Ingredients
from deepen_ext.fusers.parts import Said

if TYPE_CHECKING:
    from typing_extensions import Unpack


NO_DISTRIBUTION = (
    "fuser='spans' chooses whole words and gives no distribution of the next token: there is no likelihood, "
    "and it fits into no other loop. Use generate, or eval where answers are written, or another fuser"
)


class SpansFuser(Fuser):
    """The main model writes alone, but where it is torn between tokens: there members propose whole words.

    Of the words that they propose, the one with the largest ``sum_i w_i s_i`` is written, where ``s_i`` is
    member i's mean log probability of the word's tokens, in its own tokens. The loop does this
    (`decoding.spans.span_writer`). Nothing is fused token by token: there is no distribution of the next
    token, so no likelihood, and nothing to sample from.

    Attributes:
        margin: members propose where the main model's first choice is more probable than its second by less.
    """

    name: ClassVar[str] = "spans"
    spans: ClassVar[bool] = True

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        device: torch.device,
        *,
        margin: float,
        **common: Unpack[Common],
    ) -> None:
        """See `Fuser`.

        Raises:
            InputError: a rule of weighing, which looks at distributions.
        """
        super().__init__(vocab_sizes, device, **common)
        self.margin = margin
        if self.rule is not None:
            raise InputError(f"fuser='spans' weighs words, not distributions; leave out {self.weighing}")

    @classmethod
    def make(cls, given: Ingredients) -> SpansFuser:
        """See `Fuser.make`."""
        return cls(given.vocab_sizes, given.device, margin=given.settings.margin, **given.common)

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(NO_DISTRIBUTION)
