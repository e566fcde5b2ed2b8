"""llama.cpp as a backend: a GGUF file in this process, its layers on the CPU or on a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deepen_ext.members.backend import Capabilities, Description
from deepen_ext.members.gguf.tensors import dense_tensor, hash_samples, hash_weights
from deepen_ext.members.llama_cpp.context import cells_for
from deepen_ext.members.llama_cpp.loaded_gguf import LoadedGguf
from deepen_ext.members.llama_cpp.session import LlamaSession

_EMBEDDING = "token_embd.weight"


class LlamaBackend(LoadedGguf):
    """See `members.backend.Backend`."""

    @property
    def capabilities(self) -> Capabilities:
        """Full logits; repeatable where all weights are float32.

        With quantised weights activations are rounded too, and a last bit decides which way: a token can
        depend on what else was in its forward pass.
        """
        return Capabilities(logits=True, max_topk=None, repeatable=self._facts.all_float32)

    def open(self, lanes: int = 1, capacity: int = 0) -> LlamaSession:
        """See `Backend`."""
        return LlamaSession(self, lanes, capacity=capacity)

    def bytes_needed(self, lanes: int, tokens: int, used: int | None = None) -> Mapping[torch.device, int]:
        """See `Backend`; the logits of a step are counted beside the cache."""
        rows = lanes if used is None else used
        sequences = min(lanes, 1 << (rows - 1).bit_length()) if self.own_cells else rows
        cells = cells_for(self._model, sequences, sequences * tokens)
        return {self.device: self.cache_bytes(cells) + rows * self.vocab_size * 4}

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
            non_embedding_parameters=self._facts.non_embedding_parameters,
            dtype=self._facts.dtype,
            weights_bytes=self._model.weights_bytes,
            cache_bytes=self.cache_bytes(1000) or None,  # states that do not grow are not known
        )

    def close(self) -> None:
        """See `Backend`. The weights go when nothing holds this backend or a session of it any more."""
