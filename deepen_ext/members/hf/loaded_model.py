"""A transformers model that was loaded, and the model itself where a wrapper or quantised weights hide it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deepen_ext.errors import ModelError


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model of transformers, ready for inference.

    Attributes:
        name: the member's, for errors.
        model: may stand in a wrapper (`inner_model`), and its linear layers may be quantised.
        vocab_size: number of logits it gives (may exceed the number of tokens).
        context_length: largest number of positions; None where the config does not say. No more than those
            up to which rotary positions stay the same (`rotary`): no session is opened for more.
        device: the model's.
        dtype: of its weights and logits.
    """

    name: str
    model: PreTrainedModel
    vocab_size: int
    context_length: int | None
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse a wrapper that no session can run.

        Raises:
            ModelError: a PEFT adapter that puts states before the text, as prompt tuning does.
        """
        for wrapper in _wrappers(self.model):
            configs = getattr(wrapper, "peft_config", None)
            for config in configs.values() if isinstance(configs, dict) else ():
                if (why := refused_kind(config)) is not None:
                    raise ModelError(
                        f"{self.name}: its model has an adapter {why}, merged or "
                        "not; or take the model without the adapter (get_base_model())"
                    )


def inner_model(model: Any) -> Any:
    """The model itself, where a wrapper stands around it: `torch.compile`, PEFT.

    A wrapper's forward takes anything; only the model's says what it can do.
    """
    for found in _wrappers(model):
        model = found
    return model


def _wrappers(model: Any) -> Iterator[Any]:
    """The model as it was given, then what stands in it, and in that; the model itself comes last."""
    while True:
        yield model
        if isinstance(compiled := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = compiled
        elif callable(base := getattr(model, "get_base_model", None)):
            model = base()
        else:
            return


def refused_kind(config: Any) -> str | None:
    """Why an adapter with this PEFT config cannot be a member's, as a sentence's end; None where it can."""
    if not getattr(config, "is_prompt_learning", False) and not getattr(config, "is_adaption_prompt", False):
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    return (
        f"of the kind {kind}, which puts states before the text or between the layers, and sessions have no "
        "place for them. Adapters that change weights (LoRA, IA3, ...) can be put on"
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its values in memory: no quantised or other special weight, no sparse layout."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


def is_dense(weight: torch.Tensor) -> bool:
    """Whether `dense` can say a weight's values. Packed weights of some packages say them to nobody."""
    return is_plain(weight) or _dequantizes(weight)


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight's values: itself, not copied, or what a quantised one stands for."""
    if is_plain(weight) or not _dequantizes(weight):
        return weight
    values: torch.Tensor = weight.dequantize()
    return values


def _dequantizes(weight: torch.Tensor) -> bool:
    # Every tensor has the method, which of itself knows torch's own quantised dtypes alone.
    return weight.is_quantized or type(weight).dequantize is not torch.Tensor.dequantize
