"""One member of an ensemble: a causal language model, its tokenizer, a sequence that can be rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from deepen_ext.errors import InputError, ModelError
from deepen_ext.text import Vocabulary

_BLOCK = 256  # positions the key and value buffers grow by


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


class MemberSession:
    """One sequence through one member, with a KV cache that rolls back exactly.

    ``ids`` is what the cache holds, ``tokens_fed`` the number of tokens that ever went through the model.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.ids: list[int] = []
        self.tokens_fed = 0
        self._logits: torch.Tensor | None = None
        self._layers = _cache_layers(member)
        self._cache = Cache(layers=self._layers)

    @property
    def logits(self) -> torch.Tensor:
        """Logits ``[1, V]`` of the token after ``ids``, in the model's dtype."""
        if self._logits is None:
            raise InputError(f"{self.member.name}: no logits yet; call sync with at least one token first")
        return self._logits

    def sync(self, ids: Sequence[int]) -> torch.Tensor:
        """Bring the sequence to ``ids`` and return the logits ``[1, V]`` of the token after it.

        The prefix shared with the present sequence is kept, the KV cache rolled back to it, and the rest fed
        in one forward; nothing is computed where the sequences are equal. The logits are an inference tensor
        in the model's dtype: read them, or clone before writing.

        Raises:
            InputError: no ids, an id outside the vocabulary, or more ids than the member's context holds.
        """
        ids = list(ids)
        self._check(ids)
        keep = _common_prefix(self.ids, ids)
        if keep == len(ids) == len(self.ids) and self._logits is not None:
            return self._logits
        # The logits after a strict prefix are not kept: its last token goes through the model once more.
        keep = min(keep, len(ids) - 1)
        # Until the forward is done, the session holds the kept prefix only: an interrupt leaves it usable.
        self._logits = None
        del self.ids[keep:]
        for layer in self._layers:
            if isinstance(layer, _RollbackLayer):
                layer.truncate(keep)
        fed = torch.tensor([ids[keep:]], dtype=torch.long, device=self.member.device)
        with torch.inference_mode():
            output = self.member.model(
                input_ids=fed, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self.tokens_fed += len(ids) - keep
        self.ids.extend(ids[keep:])
        logits: torch.Tensor = output.logits[:, -1, :]
        self._logits = logits
        return logits

    def _check(self, ids: list[int]) -> None:
        member = self.member
        if not ids:
            raise InputError(
                f"{member.name}: nothing to feed; the text gives no tokens. Give a prompt that is not empty."
            )
        if member.context_length is not None and len(ids) > member.context_length:
            raise InputError(
                f"{member.name}: {len(ids)} tokens exceed its context of {member.context_length}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        if min(ids) < 0 or max(ids) >= member.vocab_size:
            raise InputError(
                f"{member.name}: token ids must lie in 0..{member.vocab_size - 1}, got {min(ids)}..{max(ids)}"
            )


def _common_prefix(left: list[int], right: list[int]) -> int:
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # the usual case, at the speed of C
        return shorter
    return next(i for i in range(shorter) if left[i] != right[i])


def _cache_layers(member: Member) -> list[Any]:
    """A rollback layer for each attention layer of the model, with the window that transformers would use."""
    layers: list[Any] = []
    for layer in DynamicCache(config=member.model.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(_RollbackLayer(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            layers.append(_RollbackLayer(None))
        elif not isinstance(layer, CacheLayerMixin) or type(layer).__name__ != "DummyLayer":
            raise ModelError(
                f"{member.name}: its layers of kind {type(layer).__name__} cannot be rolled back by tokens; "
                "use a model with attention layers only"
            )
        else:
            layers.append(layer)
    return layers


class _RollbackLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its hook for subclasses
    """Keys and values ``[B, heads, length, d]`` of one attention layer, in a buffer that grows by blocks.

    transformers' own layers copy the whole cache at every token (``torch.cat``), and its sliding-window
    layer drops states that a later rollback needs: past the window ``crop`` raises, or with
    ``activate_past_recording`` reaches only as deep as what was fed since the last ``crop`` (a second one
    gives keys that do not fit the mask). A plain ``DynamicCache()`` is exact, but lets the window's layers
    attend over all of the past. Here every state stays where it was written, a rollback only moves the
    length, and a window is a view of the last states. All four take the same time for a token within noise
    (256 to 1,500 tokens, two CPU cores), where the forward itself is 50 to 80 ms.
    """

    is_croppable = True

    def __init__(self, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.is_sliding = window is not None
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, heads, n, d]``; returns views of the states that ``get_mask_sizes(n)`` announced."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        new = key_states.shape[-2]
        start = self._visible()
        end = self.length + new
        if end > self.keys.shape[-2]:
            self.keys = _grown(self.keys, self.length, end)
            self.values = _grown(self.values, self.length, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def truncate(self, length: int) -> None:
        """Forget everything after the first ``length`` positions."""
        self.length = min(self.length, length)

    def crop(self, tokens_to_remove: int) -> None:
        self.truncate(self.length - abs(tokens_to_remove))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        start = self._visible()
        return self.length - start + query_length, start

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _visible(self) -> int:
        """First position that the next query can still see."""
        return 0 if self.window is None else max(self.length - self.window + 1, 0)


def _grown(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    rows = -(-needed // _BLOCK) * _BLOCK
    grown = buffer.new_empty((*buffer.shape[:2], rows, buffer.shape[-1]))
    grown[:, :, :used] = buffer[:, :, :used]
    return grown
