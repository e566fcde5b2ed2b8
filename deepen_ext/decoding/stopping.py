"""When a text ends: EOS, a stop string, the caller's criteria, its length."""

from __future__ import annotations

import torch

from deepen_ext.decoding.generation import FinishReason
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.text_in_progress import TextInProgress


class Stopping:
    """The rules of one run; each of its texts has criteria of its own."""

    def __init__(self, settings: Settings, texts: int) -> None:
        """Criteria that count time count from now."""
        self._settings = settings
        self._criteria = [settings.criteria() for _ in range(texts)]
        self._longest = max(map(len, settings.stop_strings), default=0)

    def ends_text(self, token: int) -> bool:
        """Whether the token is one of the EOS ids."""
        return token in self._settings.eos_ids

    def remember(self, text: TextInProgress, read: str) -> None:
        """Keep as much of the text's end as a stop string can reach into; `read` was added to it."""
        if self._longest:
            text.recent = (text.recent + read)[-(self._longest + len(read)) :]

    def reason(self, number: int, text: TextInProgress, logits: torch.Tensor) -> FinishReason | None:
        """Why the text ends with its last token, or None.

        Args:
            number: of the text.
            text: with the token.
            logits: the fused ones [1, V] that the token was chosen from.
        """
        if self.ends_text(text.ids[-1]):
            return "eos"
        if any(stop in text.recent for stop in self._settings.stop_strings):
            return "stop_string"
        criteria = self._criteria[number]
        if criteria and bool(criteria(torch.tensor([text.ids]), (logits,)).all()):
            return "stopping_criteria"
        return "length" if text.written >= text.new_tokens else None
