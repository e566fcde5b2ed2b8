"""OpenAI's penalties for tokens that the new text has already; transformers has none of their kind."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """Takes from a token's score for being in the new text, and once more for each time that it is there.

    What it gives depends on the ids and scores of the call alone.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        """Of one text.

        Args:
            prompt_length: how many of the ids are the prompt's, which counts for nothing.
            presence: taken from the score of each token that is there.
            frequency: taken for each time.
        """
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """See transformers: ids [1, L] and scores [1, V]; new scores."""
        ids, counts = torch.unique(input_ids[0, self._prompt_length :], return_counts=True)
        less = self._presence + self._frequency * counts.to(scores.dtype)
        changed = scores.clone()
        changed[0, ids] -= less
        return changed  # type: ignore[return-value]
