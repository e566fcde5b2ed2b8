"""llama.cpp as a backend: a GGUF file in this process, its layers on the CPU or on a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from deepen_ext.members.backend import Capabilities, Description
from deepen_ext.members.gguf.facts import GgufFacts
from deepen_ext.members.gguf.tensors import dense_tensor, hash_samples, hash_weights
from deepen_ext.members.llama_cpp.context import Context, cells_for
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.session import LlamaSession

_EMBEDDING = "token_embd.weight"


class LlamaBackend:
    """See `members.backend.Backend`. Logits are float32 and in main memory, wherever the layers are."""

    def __init__(self, name: str, model: LlamaModel, path: Path, facts: GgufFacts, threads: int) -> None:
        """Nothing is allocated.

        Args:
            name: the member's.
            model: loaded from the file.
            path: the GGUF file.
            facts: read from it.
            threads: of a forward pass.
        """
        self.name = name
        self.vocab_size = model.vocab_size
        self.context_length = facts.context_length
        self.device = torch.device("cpu")
        self.capabilities = Capabilities(logits=True, max_topk=None, repeatable=facts.all_float32)
        self.shares = model.keeps_positions
        self._model = model
        self._path = path
        self._facts = facts
        self._threads = threads

    def open(self, lanes: int = 1, capacity: int = 0) -> LlamaSession:
        """See `Backend`."""
        return LlamaSession(self, lanes, capacity=capacity)

    def new_context(self, sequences: int, cells: int) -> Context:
        """A cache and what runs over it, for a session."""
        return Context(
            self._model, sequences, cells, threads=self._threads, float32_cache=self._facts.all_float32
        )

    def cache_bytes(self, cells: int) -> int:
        """Bytes of a cache of so many positions."""
        return cells * self._model.cell_values() * (4 if self._facts.all_float32 else 2)

    def bytes_needed(self, lanes: int, tokens: int) -> Mapping[torch.device, int]:
        """See `Backend`; the logits of a step are counted beside the cache."""
        cells = cells_for(self._model, lanes, lanes * tokens)
        return {self.device: self.cache_bytes(cells) + lanes * self.vocab_size * 4}

    def embedding(self) -> torch.Tensor:
        """See `Backend`; float32, made from the file's blocks at every call."""
        return dense_tensor(self._path, _EMBEDDING)

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """sha256 (hex) over every tensor of the file.

        Without a dtype over samples of the blocks as they are; with one over all weights, which takes a
        second for 50 million of them.
        """
        return hash_samples(self._path) if dtype is None else hash_weights(self._path, dtype)

    def describe(self) -> Description:
        """See `Backend`."""
        return Description(
            backend=self._model.library.name,
            architecture=self._facts.architecture,
            parameters=self._model.parameters,
            dtype=self._facts.dtype,
            weights_bytes=self._model.weights_bytes,
            cache_bytes=self.cache_bytes(1000) or None,  # states that do not grow are not known
        )

    def close(self) -> None:
        """See `Backend`. The weights go when nothing holds this backend or a session of it any more."""
