"""One member of an ensemble: a causal language model, its tokenizer and its vocabulary as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepen_ext.text import Vocabulary


@dataclass
class Member:
    """A causal language model that can take part in an ensemble.

    ``eos_ids`` are all token ids that end a text; ``context_length`` is the largest number of positions (None
    when the config does not say); ``device`` and ``dtype`` are the model's.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    context_length: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def embedding(self) -> torch.Tensor:
        """Input embeddings ``[rows, d]`` in the model's dtype, not copied."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def vocab_size(self) -> int:
        """Number of logits the model gives (may exceed the number of tokens)."""
        return self.vocabulary.vocab_size

    def name_of(self, token: int) -> str:
        """How the tokenizer writes a special token, which has no text; "" where the id has no token."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""


def unique_names(members: Sequence[Member]) -> list[str]:
    """Members' names, numbered where two are the same (timings are by name)."""
    names = [member.name for member in members]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
