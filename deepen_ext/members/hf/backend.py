"""transformers as a backend: a model in this process, on one device or spread over several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import __version__

from deepen_ext.errors import ModelError
from deepen_ext.members.backend import Capabilities, Description
from deepen_ext.members.hf.bytes_needed import estimate_bytes
from deepen_ext.members.hf.kv_cache import LaneCache, cache_bytes
from deepen_ext.members.hf.loaded_model import LoadedModel, inner_model
from deepen_ext.members.hf.rooms import forget_room, idle_bytes
from deepen_ext.members.hf.session import HFSession, _on_fixed_buffers
from deepen_ext.members.hf.weights import (
    embedding,
    fingerprint,
    non_embedding_parameters,
    parameter_count,
    stored_bytes,
)


class HFBackend(LoadedModel):
    """See `members.backend.Backend`."""

    @property
    def capabilities(self) -> Capabilities:
        """Full logits; repeatable where they are float32.

        Weights that were rounded on load are float32 products too, in a batch as alone. Of quantised
        checkpoints nobody knows: some round activations, by scales that depend on the rows beside.
        """
        quantiser = getattr(inner_model(self.model), "hf_quantizer", None)
        known = quantiser is None or not quantiser.pre_quantized
        repeatable = known and self.dtype == torch.float32
        return Capabilities(logits=True, max_topk=None, repeatable=repeatable, writes=_can_write(self))

    def open(self, lanes: int = 1, capacity: int = 0) -> HFSession:
        """See `Backend`."""
        return HFSession(self, lanes, capacity=capacity)

    def bytes_needed(self, lanes: int, tokens: int, used: int | None = None) -> Mapping[torch.device, int]:
        """See `Backend`; every lane has room, used or not."""
        idle = {self.device: idle_bytes(self)}
        needed = estimate_bytes(self, lanes, tokens)
        return {device: max(size - idle.get(device, 0), 0) for device, size in needed.items()}

    def embedding(self) -> torch.Tensor | None:
        """See `Backend`; not copied unless they are quantised or wait on the disk."""
        return embedding(self.model)

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """See `Backend` and `weights.fingerprint`."""
        return fingerprint(self.model, dtype)

    def describe(self) -> Description:
        """See `Backend`; the bytes of quantised weights are those of their packed values and scales."""
        return Description(
            backend=f"transformers {__version__}",
            architecture=str(self.model.config.get_text_config().model_type),
            parameters=parameter_count(self.model),
            non_embedding_parameters=non_embedding_parameters(self.model),
            dtype=str(self.dtype).removeprefix("torch."),
            weights_bytes=stored_bytes(self.model),
            cache_bytes=sum(cache_bytes(self, 1, 1000).values()),
        )

    def close(self) -> None:
        """Free the room that is kept for the model's next session."""
        forget_room(self)


def _can_write(loaded: LoadedModel) -> bool:
    """Whether its sessions are `WritingSession`s: on CUDA, where short pieces go over fixed buffers."""
    try:
        return loaded.device.type == "cuda" and _on_fixed_buffers(loaded, LaneCache(loaded, 1))
    except ModelError:  # it opens no session
        return False
