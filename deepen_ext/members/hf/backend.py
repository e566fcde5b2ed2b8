"""transformers as a backend: a model in this process, on the CPU or on one CUDA device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from transformers import __version__

from deepen_ext.members.backend import Capabilities, Description
from deepen_ext.members.hf.bytes_needed import estimate_bytes
from deepen_ext.members.hf.kv_cache import cache_bytes
from deepen_ext.members.hf.loaded_model import LoadedModel, dense, inner_model
from deepen_ext.members.hf.rooms import forget_room, idle_bytes
from deepen_ext.members.hf.session import HFSession

_SAMPLES = 1024  # of each weight, in a fingerprint of the weights as they are


class HFBackend(LoadedModel):
    """See `members.backend.Backend`."""

    @property
    def capabilities(self) -> Capabilities:
        """Full logits; repeatable where they are float32."""
        return Capabilities(logits=True, max_topk=None, repeatable=self.dtype == torch.float32)

    def open(self, lanes: int = 1, capacity: int = 0) -> HFSession:
        """See `Backend`."""
        return HFSession(self, lanes, capacity=capacity)

    def bytes_needed(self, lanes: int, tokens: int) -> Mapping[torch.device, int]:
        """See `Backend`."""
        return {self.device: max(estimate_bytes(self, lanes, tokens) - idle_bytes(self), 0)}

    def embedding(self) -> torch.Tensor:
        """See `Backend`; not copied unless they are quantised."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return dense(weight)

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """sha256 (hex) over names, shapes and values of every weight.

        Without a dtype up to 1,024 evenly spaced values of each: all of them would be more certain and would
        read every byte of a model; any training changes samples.
        """
        digest = hashlib.sha256()
        for name, weight in inner_model(self.model).named_parameters():
            digest.update(f"{name} {list(weight.shape)} ".encode())
            flat = dense(weight.detach()).flatten()
            kept = flat[:: max(len(flat) // _SAMPLES, 1)] if dtype is None else flat.to("cpu", dtype)
            digest.update(kept.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> Description:
        """See `Backend`."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        return Description(
            backend=f"transformers {__version__}",
            architecture=str(self.model.config.get_text_config().model_type),
            parameters=sum(one.numel() for one in self.model.parameters()),
            dtype=str(self.dtype).removeprefix("torch."),
            weights_bytes=sum(one.nbytes for one in weights),
            cache_bytes=cache_bytes(self, 1, 1000),
        )

    def close(self) -> None:
        """Free the room that is kept for the model's next session."""
        forget_room(self)
