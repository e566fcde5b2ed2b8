"""A transformers model that was loaded, and the model itself where a wrapper or quantised weights hide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model of transformers, ready for inference.

    Attributes:
        name: the member's, for errors.
        model: may stand in a wrapper (`inner_model`), and its linear layers may be quantised.
        vocab_size: number of logits it gives (may exceed the number of tokens).
        context_length: largest number of positions; None where the config does not say.
        device: the model's.
        dtype: of its weights and logits.
    """

    name: str
    model: PreTrainedModel
    vocab_size: int
    context_length: int | None
    device: torch.device
    dtype: torch.dtype


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
