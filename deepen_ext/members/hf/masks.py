"""Sequences of different lengths in one forward: which models can run them, and what each token sees."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepen_ext.errors import ModelError
from deepen_ext.members.hf import attention
from deepen_ext.members.hf.kv_cache import ManyLanes
from deepen_ext.members.hf.loaded_model import LoadedModel, inner_model


def check_batches(loaded: LoadedModel, windows: Sequence[int | None]) -> None:
    """Raise ModelError unless the model can run sequences of different lengths in one forward, each exactly.

    They need positions and masks of their own. ``windows`` are those of the model's layers.
    """
    model = inner_model(loaded.model)
    config = model.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", None)
    types = getattr(config, "layer_types", None) or []
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        reason = "takes no position_ids"
    elif implementation not in ("sdpa", attention.NAME, "eager"):
        reason = f"has attention '{implementation}'; load it with attn_implementation='sdpa'"
    elif "chunked_attention" in types:
        reason = "has chunked attention"
    elif len(windows) > 1 and not _takes_a_mask_by_layer_type(model):
        reason = "has layers with different windows but takes one mask for all"
    else:
        return
    raise ModelError(
        f"{loaded.name}: this model ({type(model).__name__}) cannot run texts of different lengths "
        f"together: it {reason}. Generate one prompt at a time"
    )


def _takes_a_mask_by_layer_type(model: PreTrainedModel) -> bool:
    """Whether the model takes masks prepared by the caller, one for each layer type (most models do)."""
    source = inspect.getsource(inspect.unwrap(type(model.base_model).forward))
    return re.search(r"isinstance\(.*attention_mask, dict\)", source) is not None


def attention_mask(
    positions: torch.Tensor, feed: ManyLanes, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Which slots each query sees: those up to its position, within its layer's window.

    Additive, ``[b, 1, W, slots]``, as every attention of transformers takes it; where layers have different
    windows, one for each layer type. ``positions`` is int64 ``[b, W]``.
    """
    masks = {}
    for window, first in feed.first.items():
        slots = torch.arange(first, feed.end, device=positions.device)
        hidden = slots > positions[:, :, None]
        if window is not None:
            hidden |= slots <= positions[:, :, None] - window
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        masks[window] = zeros.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {
        "full_attention" if window is None else "sliding_attention": mask for window, mask in masks.items()
    }
