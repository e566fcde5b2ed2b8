"""When a text ends: EOS, a stop string, the caller's criteria, its length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList

from deepen_ext.decoding.generation import FinishReason
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.text_in_progress import TextInProgress


@dataclass(frozen=True)
class _Rules:
    settings: Settings
    criteria: StoppingCriteriaList
    longest: int  # of its stop strings, in characters


class Stopping:
    """The rules of one run's texts."""

    def __init__(self) -> None:
        self._rules: dict[int, _Rules] = {}

    def add(self, number: int, settings: Settings) -> None:
        """One more text. Criteria that count time count from now."""
        longest = max(map(len, settings.stop_strings), default=0)
        self._rules[number] = _Rules(settings, settings.criteria(), longest)

    def forget(self, number: int) -> None:
        """The text has ended."""
        del self._rules[number]

    def ends(self, number: int) -> frozenset[int]:
        """The text's EOS ids."""
        return self._rules[number].settings.eos_ids

    def ends_text(self, number: int, token: int) -> bool:
        """Whether the token is one of the text's EOS ids."""
        return token in self.ends(number)

    def remember(self, number: int, text: TextInProgress, read: str) -> None:
        """Keep as much of the text's end as a stop string can reach into; `read` was added to it."""
        if longest := self._rules[number].longest:
            text.recent = (text.recent + read)[-(longest + len(read)) :]

    def reason(self, number: int, text: TextInProgress, logits: torch.Tensor) -> FinishReason | None:
        """Why the text ends with its last token, or None.

        Args:
            number: of the text.
            text: with the token.
            logits: the fused ones [1, V] that the token was chosen from.
        """
        rules = self._rules[number]
        if self.ends_text(number, text.ids[-1]):
            return "eos"
        if any(stop in text.recent for stop in rules.settings.stop_strings):
            return "stop_string"
        if rules.criteria:
            ids = torch.tensor([text.ids], device="cpu")
            if bool(rules.criteria(ids, (logits,)).all()):
                return "stopping_criteria"
        return "length" if text.written >= text.new_tokens else None
