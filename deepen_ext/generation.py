"""What a generation is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "length", "stop_string", "context"]


@dataclass
class Timings:
    """Where the time of one generation went, in milliseconds of wall clock; `steps` tokens were made.

    The first step reads the prompt: its share is in `prompt_ms` and in nothing else. On CUDA work is only
    queued until the token is read: what the device takes for members and fusion shows in `sampling_ms`.
    """

    steps: int = 0
    prompt_ms: float = 0.0
    members_ms: dict[str, float] = field(default_factory=dict)  # forward passes, by member
    fusion_ms: float = 0.0  # top-k, relative rows, search
    handoff_ms: float = 0.0  # bytes, re-tokenisation
    sampling_ms: float = 0.0
    total_ms: float = 0.0

    @property
    def ms_per_token(self) -> float:
        """Total without the prompt, for each token after the first."""
        return (self.total_ms - self.prompt_ms) / max(self.steps - 1, 1)

    @property
    def fusion_ms_per_token(self) -> float:
        """Fusion without the prompt's step, for each token after the first."""
        return self.fusion_ms / max(self.steps - 1, 1)


@dataclass(frozen=True)
class Generation:
    """A text that the ensemble wrote.

    Attributes:
        text: the new text, without the prompt. A stop string that ended it is kept, as transformers keeps it.
        token_ids: the main model's new tokens, a final EOS included.
        finish_reason: "eos", "length" (max_new_tokens reached), "stop_string", or "context": some member's
            context is full (an assistant may need more tokens for the text than the main model).
        changed_tokens: how many tokens differ from the most probable one of the main model alone.
        timings: where the time went.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    changed_tokens: int
    timings: Timings
