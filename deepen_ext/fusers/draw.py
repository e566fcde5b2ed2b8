"""ME: one member, drawn by the weights, speaks for a token (Fu et al., arXiv 2605.00419)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from deepen_ext.errors import InputError
from deepen_ext.fusers.ingredients import Ingredients
from deepen_ext.fusers.union_vocab import UnionVocabFuser

if TYPE_CHECKING:
    from typing_extensions import Self


class DrawFuser(UnionVocabFuser):
    """``q = sum_i w_i p_i``, sampled in two draws: a member by the weights w, then a token of its p_i.

    Tokens have the distribution q of `UnionVocabFuser`, and one member is asked instead of all. The loop
    draws the member (`Chooser.share`, `Assistants.place`): it asks nobody else, and the weights are 1 for the
    drawn member and 0 for the others. The draw depends on the seed, the text's number and the token's
    position alone, so drafts stay exact. A likelihood, and the logits processor for transformers' own
    ``generate``, have everybody's word, and get q itself.

    What is not as in the paper, which has one forward pass a token: the text is made of the main model's
    tokens, and the main model writes ahead, so it reads every token. A token costs the main model's forward
    pass, and the drawn member's where that is another one.

    What is not q: temperature, top-k, top-p and other processors act on the drawn member's distribution
    alone. And an assistant's special tokens, which the main model cannot write, are left out of p_i before
    the draw instead of out of q.

    Greedy decoding draws nothing, and is refused.
    """

    name: ClassVar[str] = "draw"
    draws: ClassVar[bool] = True

    @classmethod
    def make(cls, given: Ingredients) -> Self:
        """See `Fuser.make`. Tables of tokens are made here: any step may be the first to draw an assistant.

        Raises:
            InputError: a rule of weighing: what a member says nobody knows before it is asked.
        """
        fuser = super().make(given)
        if fuser.rule is not None:
            raise InputError(
                f"fuser='draw' asks one member only, so it cannot weigh members by what each says; leave out "
                f"{fuser.weighing}, or use fuser='union-vocab'"
            )
        _ = fuser._targets
        return fuser
