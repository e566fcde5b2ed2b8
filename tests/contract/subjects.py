"""The backends that the contract holds for. A new backend is one more function in `SUBJECTS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepen_ext.members.backend import Backend
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.top_k_only import TopKOnly

VOCAB = 120
CONTEXT = 200
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    Attributes:
        backend: of a model with `VOCAB` logits and a context of `CONTEXT` tokens.
        other_weights: makes a backend of the same model with other weights, and one of a copy in bfloat16.
        breaks: within it the next forward pass fails.
        tolerance: by which two probabilities of one text may differ, however it was fed.
    """

    backend: Backend
    other_weights: Callable[[], tuple[Backend, Backend]]
    breaks: Callable[[], AbstractContextManager[None]]
    tolerance: float = 5e-5


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHAPE | (_WINDOW if "gemma" in family else {})))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # from the usual initialisation no token would depend on another
    return model


def _transformers(family: str) -> Subject:
    model = _model(family)

    def backend(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> HFBackend:
        return HFBackend(family, model.to(dtype), VOCAB, CONTEXT, torch.device("cpu"), dtype)

    def others() -> tuple[Backend, Backend]:
        changed = _model(family)
        next(changed.parameters()).data.mul_(1.01)
        return backend(changed), backend(_model(family), torch.bfloat16)

    @contextmanager
    def breaks() -> Iterator[None]:
        def fail(*_: object) -> None:
            raise RuntimeError("out of luck")

        hook = model.get_input_embeddings().register_forward_pre_hook(fail)
        try:
            yield
        finally:
            hook.remove()

    return Subject(backend(model), others, breaks)


def _top_k_only(family: str, k: int) -> Subject:
    inner = _transformers(family)

    def others() -> tuple[Backend, Backend]:
        changed, coarse = inner.other_weights()
        return TopKOnly(changed, k), TopKOnly(coarse, k)

    return Subject(TopKOnly(inner.backend, k), others, inner.breaks)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "transformers": lambda: _transformers("llama"),
    "transformers, sliding windows": lambda: _transformers("gemma3_text"),
    "top-k only": lambda: _top_k_only("llama", 20),
    "top-k only, sliding windows": lambda: _top_k_only("gemma3_text", 7),
}
