"""A GGUF model that is loaded, with what every part of its backend asks of it."""

from __future__ import annotations

from pathlib import Path

import torch

from deepen_ext.members.gguf.facts import GgufFacts
from deepen_ext.members.llama_cpp.context import Context
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads


class LoadedGguf:
    """The model behind a backend and its sessions.

    Attributes:
        name: the member's.
        vocab_size: V, the number of logits.
        context_length: tokens of a text that the model was made for; None where the file does not say.
        device: where logits are: in main memory, wherever the layers are.
        shares: a text can take over the states of another text's beginning.
        own_cells: each sequence of a context has cells of its own (see `Context`).
    """

    def __init__(self, name: str, model: LlamaModel, path: Path, facts: GgufFacts, threads: Threads) -> None:
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
        self.shares = model.keeps_positions
        self.own_cells = model.window is not None
        self._model = model
        self._path = path
        self._facts = facts
        self._threads = threads

    def __reduce__(self) -> str:
        """For pickle and copy, which would name a pointer of ctypes."""
        raise TypeError(
            f"{self.name}: a model in llama.cpp cannot be pickled or copied; load it in each process "
            "(threads may share it)"
        )

    def new_context(self, sequences: int, room: int) -> Context:
        """A cache of so many positions (see `Context.room`), and what runs over it.

        Float32 weights get a float32 cache, so that a text is the same however it is fed; others float16.
        """
        return Context(
            self._model, sequences, room, threads=self._threads, float32_cache=self._facts.all_float32
        )

    def cache_bytes(self, cells: int) -> int:
        """Bytes of a cache of so many positions."""
        return cells * self._model.cell_values() * (4 if self._facts.all_float32 else 2)
