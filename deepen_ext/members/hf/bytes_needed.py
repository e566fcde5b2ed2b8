"""What a session of a transformers model takes."""

from __future__ import annotations

import os
import re

import torch

from deepen_ext.members.hf.kv_cache import CHUNK, cache_bytes, largest_head
from deepen_ext.members.hf.loaded_model import LoadedModel


def estimate_bytes(loaded: LoadedModel, lanes: int, tokens: int) -> dict[torch.device, int]:
    """Bytes by device that a session takes beside the weights: of so many lanes, with so many tokens each.

    On each layer's device its cache and the largest activations of one layer; the logits of two steps where
    they are; on CUDA also cuBLAS's workspace on the session's stream; and, where weights wait on the disk,
    room for the largest of them.
    """
    config = loaded.model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = largest_head(config)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    fed = min(lanes * tokens, CHUNK)
    activations = fed * (4 * hidden + 3 * inner + 4 * heads * head_dim)
    # Masks, and keys and values repeated for every query head, where lanes are fed together.
    attention = 2 * fed * tokens + 2 * lanes * tokens * heads * head_dim if lanes > 1 else fed * tokens
    logits = 2 * lanes * loaded.vocab_size * loaded.dtype.itemsize
    visiting = max((one.nbytes for one in loaded.model.parameters() if one.is_meta), default=0)
    found = {loaded.device: logits}
    for device, cache in cache_bytes(loaded, lanes, tokens).items():
        found[device] = found.get(device, 0) + cache + visiting
        found[device] += (activations + attention) * loaded.dtype.itemsize
    return {
        device: int(size + (_cublas_workspace(device) if device.type == "cuda" else 0))
        for device, size in found.items()
    }


def _cublas_workspace(device: torch.device) -> int:
    """Bytes that torch takes for cuBLAS on each stream; captured steps use their stream's.

    As `parseChosenWorkspaceSize` in torch's CublasHandlePool.cpp, where Blackwell's is as large as Hopper's
    from some version on. torch before 2.13 does not tell.
    """
    if pairs := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return 1024 * sum(int(size) * int(count) for size, count in pairs)
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    return 1024 * (8 * 4096 if hopper else 2 * 4096 + 8 * 16)
