"""Boundary awareness: an assistant sits out while its last token is likely to be part of a longer one.

An assistant reads the text so far in its own tokens. Where the main model goes on inside one of them (the
text ends in ` straw`, ` strawberries` is one token of the assistant's), the assistant's last token is one
that it never saw followed by the rest of the word: it gives what may follow ` straw` as a word of its own,
and so speaks against the right continuation.

Whether this is so depends on what comes next, which the main model foresees well: a candidate that would
change the assistant's last token, were it appended, says that the token is unfinished. Where such candidates
together have a probability of `THRESHOLD` or more, the assistant sits out this step.

That is for an assistant that helps the main model. One that counts more than the main model would leave the
step to the weaker one of the two. Such an assistant goes on speaking, with as much of its weight as the main
model finds probable that its last token stands; the rest goes to the main model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepen_ext.decoding.prompt_weights import LEAST_WEIGHT
from deepen_ext.ops.topk_softmax import TopK
from deepen_ext.text.characters import whole_characters
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary

THRESHOLD = 0.2  # see docs/boundary.md
CANDIDATES = 16  # of the main model's, most probable first, are enough


@dataclass(frozen=True)
class BoundaryRule:
    """Tells when an assistant should sit out a step; see the module's text.

    It depends on the text and on the candidates alone, so it needs no look-ahead, and gives the same answer
    however the text came about.
    """

    main: Vocabulary
    threshold: float = THRESHOLD

    def sits_out(self, text: GrowingText, candidates: Sequence[tuple[int, float]]) -> bool:
        """Whether candidates that would change the last of `text.ids` reach the threshold together.

        A candidate without text (EOS) changes nothing, nor does one that begins with an unfinished character;
        of others with an unfinished character at the end, the whole characters count.

        Args:
            text: the assistant's, with no character waiting to be finished.
            candidates: the main model's token ids and probabilities, most probable first. `CANDIDATES` of
                them are enough; it looks at as many as it takes to settle the question, most often one.
        """
        changing, unseen = 0.0, 1.0
        for token, probability in candidates:
            if changing + unseen < self.threshold:
                return False
            unseen -= probability
            if self._changes(text, token):
                changing += probability
                if changing >= self.threshold:
                    return True
        return False

    def share(
        self, text: GrowingText, candidates: Sequence[tuple[int, float]], main: float, weight: float
    ) -> float:
        """How much of its weight an assistant keeps, 0 to 1; 0: it sits out.

        All or nothing where it does not count more than the main model: see `sits_out`. Otherwise 1 less the
        probability of the candidates that would change the last of `text.ids`, or 0 (see `share_left`).

        Args:
            text: see `sits_out`.
            candidates: see `sits_out`.
            main: the main model's weight.
            weight: the assistant's, of weights that sum to 1.
        """
        if weight <= main:
            return float(not self.sits_out(text, candidates))
        return share_left(
            weight, 1.0 - math.fsum(shares for token, shares in candidates if self._changes(text, token))
        )

    def _changes(self, text: GrowingText, token: int) -> bool:
        return not text.keeps_ids(whole_characters(self.main.bytes_of(token)))


def share_left(weight: float, share: float) -> float:
    """This share of a weight; 0 where something is taken from it and less than `LEAST_WEIGHT` is left."""
    return share if share == 1 or weight * share >= LEAST_WEIGHT else 0.0


def candidates_of(top: TopK, rows: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    """What `BoundaryRule.sits_out` takes, for these rows of the main model's most probable tokens."""
    ids, probs = top.ids[:, :CANDIDATES].tolist(), top.probs[:, :CANDIDATES].tolist()
    return {row: list(zip(ids[row], probs[row], strict=True)) for row in rows}
