"""One member of an ensemble: a causal language model, its tokenizer and its vocabulary as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from deepen_ext.errors import InputError
from deepen_ext.members.backend import Backend
from deepen_ext.text.vocabulary import Vocabulary

if TYPE_CHECKING:  # transformers takes seconds to import, and fusion alone does not need it
    from transformers import PreTrainedTokenizerBase

_SETS_KEPT = 32  # sets of ids that are never written: prompts choose which, by their special tokens


@dataclass
class Member:
    """A causal language model that can take part in an ensemble.

    Attributes:
        name: for users.
        backend: what computes its distributions.
        tokenizer: transformers' tokenizer of it.
        vocabulary: its tokens as bytes.
        eos_ids: all token ids that end a text.
    """

    name: str
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    _unwritable: dict[frozenset[int], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def model(self) -> Any:
        """The transformers model.

        Raises:
            InputError: the member is not computed by transformers in this process.
        """
        model = getattr(self.backend, "model", None)
        if model is None:
            raise InputError(
                f"{self.name}: this needs a transformers model in this process, but "
                f"{type(self.backend).__name__} computes the member; load the model's folder or hub name"
            )
        return model

    @property
    def embedding(self) -> torch.Tensor:
        """Input embeddings ``[rows, d]`` in the model's dtype.

        Raises:
            InputError: the backend has none.
        """
        found = self.backend.embedding()
        if found is None:
            raise InputError(
                f"{self.name}: its embeddings are out of reach, and the recipes 'calibrated' and 'paper' "
                "compare them; use recipe='bytes', which needs none"
            )
        return found

    @property
    def device(self) -> torch.device:
        """Where its distributions are."""
        return self.backend.device

    @property
    def context_length(self) -> int | None:
        """The largest number of tokens of a text; None when nothing says so."""
        return self.backend.context_length

    def fits(self, tokens: int) -> bool:
        """Whether a text of this many tokens fits the context."""
        return self.context_length is None or tokens <= self.context_length

    @property
    def vocab_size(self) -> int:
        """Number of logits the model gives (may exceed the number of tokens)."""
        return self.vocabulary.vocab_size

    def name_of(self, token: int) -> str:
        """How the tokenizer writes a special token, which has no text; "" where the id has no token."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else ""

    def bytes_written(self, token: int) -> bytes:
        """The token's bytes as other members read them: a special token, which has none, is its name."""
        return self.vocabulary.bytes_of(token) or self.name_of(token).encode()

    def special_in(self, texts: Sequence[str]) -> list[int]:
        """The tokens without text whose names stand in one of these texts."""
        names = self._names_without_text.items() if texts else ()
        return [i for i, name in names if any(name in text for text in texts)]

    @cached_property
    def size(self) -> int | None:
        """Number of weights outside of the embeddings; None where the backend cannot know. Counted once."""
        return self.backend.describe().non_embedding_parameters

    @cached_property
    def _names_without_text(self) -> dict[int, str]:
        return {i: name for i in sorted(self._without_text) if (name := self.name_of(i))}

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
        found = self._unwritable.get(kept)
        if found is None:
            ids = sorted(self._without_text - kept)
            found = self._unwritable[kept] = torch.tensor(ids, dtype=torch.long, device=self.device)
            for oldest in list(self._unwritable)[:-_SETS_KEPT]:  # threads may share a member
                self._unwritable.pop(oldest, None)
        return found


def unique_names(members: Sequence[Member]) -> list[str]:
    """Members' names, numbered where two are the same (timings are by name)."""
    names = [member.name for member in members]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
