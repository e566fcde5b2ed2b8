"""One member of an ensemble: a causal language model, its tokenizer and its vocabulary as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepen_ext.text.vocabulary import Vocabulary


def inner_model(model: Any) -> Any:
    """The model itself, where a wrapper stands around it: `torch.compile`, PEFT.

    A wrapper's forward takes anything; only the model's says what it can do.
    """
    while True:
        if isinstance(compiled := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = compiled
        elif callable(base := getattr(model, "get_base_model", None)):
            model = base()
        else:
            return model


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its values in memory: no quantised or other special weight, no sparse layout."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight's values: itself, not copied, or what a quantised one stands for."""
    if is_plain(weight) or not hasattr(weight, "dequantize"):
        return weight
    values: torch.Tensor = weight.dequantize()
    return values


@dataclass
class Member:
    """A causal language model that can take part in an ensemble.

    ``eos_ids`` are all token ids that end a text; ``context_length`` is the largest number of positions (None
    when the config does not say); ``device`` and ``dtype`` are the model's. The model may stand in a wrapper
    (`inner_model`), and its linear layers may be quantised.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    context_length: int | None
    device: torch.device
    dtype: torch.dtype
    _unwritable: dict[frozenset[int], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def embedding(self) -> torch.Tensor:
        """Input embeddings ``[rows, d]`` in the model's dtype, not copied unless they are quantised."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return dense(weight)

    @property
    def vocab_size(self) -> int:
        """Number of logits the model gives (may exceed the number of tokens)."""
        return self.vocabulary.vocab_size

    def name_of(self, token: int) -> str:
        """How the tokenizer writes a special token, which has no text; "" where the id has no token."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""

    def special_in(self, texts: Sequence[str]) -> list[int]:
        """The tokens without text whose names stand in one of these texts."""
        names = ((i, self.name_of(i)) for i in self._without_text) if texts else ()
        return [i for i, name in names if name and any(name in text for text in texts)]

    @cached_property
    def _without_text(self) -> frozenset[int]:
        texts = enumerate(self.vocabulary.tokens)
        return frozenset(i for i, text in texts if not text).difference(self.eos_ids)

    def unwritable(self, but: Iterable[int] = ()) -> torch.Tensor:
        """The ids that are never written, int64 [n], rising, on the model's device; to be read only.

        What can be written is a token with text, and EOS. Other special tokens are part of prompts alone, and
        logits beyond the tokenizer mean nothing.

        Args:
            but: ids that can be written all the same, such as others that end a text.
        """
        kept = self._without_text.intersection(but)
        if kept not in self._unwritable:
            ids = sorted(self._without_text - kept)
            self._unwritable[kept] = torch.tensor(ids, dtype=torch.long, device=self.device)
        return self._unwritable[kept]


def forbid(logits: torch.Tensor, ids: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """Logits [b, V] with -inf for `Member.unwritable` ids; a copy where there are any, unless `in_place`."""
    if not len(ids):
        return logits
    with torch.inference_mode(in_place):  # what a session gives can be written to there alone
        return logits.index_fill_(1, ids, -torch.inf) if in_place else logits.index_fill(1, ids, -torch.inf)


def unique_names(members: Sequence[Member]) -> list[str]:
    """Members' names, numbered where two are the same (timings are by name)."""
    names = [member.name for member in members]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
