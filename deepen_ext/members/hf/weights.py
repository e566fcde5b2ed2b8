"""A model's weights as they are kept: quantised, tied, or waiting on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from deepen_ext.members.hf.loaded_model import dense, inner_model, is_dense

_SAMPLES = 1024  # of each weight, in a fingerprint of the weights as they are


def embedding(model: Any) -> torch.Tensor | None:
    """Input embeddings [rows, d]; not copied where they are in memory as they are. None: not to be read."""
    module = inner_model(model).get_input_embeddings()
    for _, weight in _own_weights(module, ""):
        if weight.dim() == 2 and is_dense(weight):
            return dense(weight)
    return None


def fingerprint(model: Any, dtype: torch.dtype | None) -> str:
    """sha256 (hex) over names, shapes and values of every weight; see `Backend.fingerprint`.

    Without a dtype up to 1,024 evenly spaced values of each: all of them would be more certain and would
    read every byte of a model; any training changes samples. Of quantised weights that do not say their
    values, the packed bytes count, for every dtype: no copy in another precision is found.
    """
    digest = hashlib.sha256()
    for name, weight in _each_weight(model):
        digest.update(f"{name} {list(weight.shape)} ".encode())
        for part in [dense(weight)] if is_dense(weight) else _parts(weight):
            flat = part.flatten()
            kept = flat[:: max(len(flat) // _SAMPLES, 1)] if dtype is None else flat.to("cpu", dtype)
            digest.update(kept.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def parameter_count(model: Any) -> int | None:
    """Number of weights; None for checkpoints whose packing hides it."""
    model = inner_model(model)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None or not quantiser.pre_quantized:
        return sum(int(weight.numel()) for weight in _once(model))
    method = str(getattr(quantiser.quantization_config.quant_method, "value", ""))
    return int(model.num_parameters()) if method.startswith(("bitsandbytes", "torchao")) else None


def non_embedding_parameters(model: Any) -> int | None:
    """Number of weights outside of the embeddings, of tokens and positions, and of the output's table.

    With what an adapter adds to them. None as `parameter_count`.
    """
    count, model = parameter_count(model), inner_model(model)
    if count is None:
        return None
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [one for one in model.modules() if isinstance(one, torch.nn.Embedding) or one in ends]
    own = {id(weight) for one in tables for weight in one.parameters()}
    return count - sum(int(weight.numel()) for weight in _once(model) if id(weight) in own)


def stored_bytes(model: Any) -> int:
    """Bytes of all weights and buffers as they are kept: packed ones packed, those on the disk included."""
    model = inner_model(model)
    found: dict[int, int] = {}
    for tensor in (*_once(model), *model.buffers()):
        for part in _parts(tensor):
            found[part.data_ptr() or id(tensor)] = part.nbytes
    return sum(found.values())


def _once(model: Any) -> Iterator[torch.Tensor]:
    """The weights, tied ones once. Where they wait on the disk they are two objects."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return (one for name, one in model.named_parameters() if not (one.is_meta and name in tied))


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a weight: itself, or the packed values and scales of a quantised one.

    A quantised weight's own `nbytes` is that of the values it stands for.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor.detach()
    # bitsandbytes hangs its scales on the parameter.
    state: Any = getattr(tensor, "quant_state", None)
    for holder in (state, getattr(state, "state2", None)):
        yield from (one for one in vars(holder).values() if isinstance(one, torch.Tensor)) if holder else ()
    if isinstance(scales := getattr(tensor, "SCB", None), torch.Tensor):
        yield scales


def _each_weight(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once, by its name. Of quantised checkpoints also the buffers, which hold their weights."""
    model = inner_model(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    quantiser = getattr(model, "hf_quantizer", None)
    with_buffers = quantiser is not None and quantiser.pre_quantized
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        waits = any(one.is_meta for one in module.parameters(recurse=False))
        for name, weight in _own_weights(module, prefix):
            # What was read from the disk is another object each time.
            if name not in tied if waits else id(weight) not in seen:
                yield name, weight.detach()
            if not waits:
                seen.add(id(weight))
        if with_buffers:
            left_out = module._non_persistent_buffers_set
            buffers = module.named_buffers(prefix, recurse=False)
            yield from ((name, one) for name, one in buffers if name.rpartition(".")[2] not in left_out)


def _own_weights(module: torch.nn.Module, prefix: str) -> list[tuple[str, torch.Tensor]]:
    """A module's own weights; those that accelerate keeps on the disk or the host are read."""
    if not any(one.is_meta for one in module.parameters(recurse=False)):
        return list(module.named_parameters(prefix, recurse=False))
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return list(module.named_parameters(prefix, recurse=False))
