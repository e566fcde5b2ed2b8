"""transformers' own making of logits processors, without a model.

settings.py imports this only for a call that samples or asks for one: `GenerationMixin` brings a second of
imports (torch.distributed, torch._dynamo, sympy), which a process whose members run elsewhere needs for
nothing else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import GenerationMixin, PretrainedConfig


class _ProcessorMaker(GenerationMixin):
    """What `_get_logits_processor` needs of a model: the vocabulary's size."""

    def __init__(self, vocab_size: int) -> None:
        self.config: Any = PretrainedConfig(vocab_size=vocab_size)  # type: ignore[call-arg]


@cache
def processor_maker(vocab_size: int) -> Any:
    """Has transformers' `_get_logits_processor`; the same one for each call."""
    return _ProcessorMaker(vocab_size)
