"""The part of llama.cpp's C API that is used here: structures as they lie in memory, and functions.

Structures change from release to release, and nothing in the library tells their layout. So a layout counts
only where the library's own defaults, read by it, are the ones that llama.cpp documents; and what a context
says of itself is compared with what was asked for (`context.Context`).
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from typing import Any, NamedTuple

pointer = c.c_void_p
token = position = sequence = c.c_int32

# A library's structure may have further fields at its end. They are passed back as the library filled them.
_ROOM = [("room", c.c_ubyte * 256)]

LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, pointer)
AbortCallback = c.CFUNCTYPE(c.c_bool, pointer)
ProgressCallback = c.CFUNCTYPE(c.c_bool, c.c_float, pointer)


class Batch(c.Structure):
    """llama_batch: n tokens, each with its position, its sequence, and whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", pointer),
        ("embd", pointer),
        ("pos", pointer),
        ("n_seq_id", pointer),
        ("seq_id", pointer),
        ("logits", pointer),
    )


class ModelParams(c.Structure):
    """llama_model_params."""

    _fields_ = (
        ("devices", pointer),
        ("tensor_buft_overrides", pointer),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", pointer),
        ("progress_callback", ProgressCallback),
        ("progress_callback_user_data", pointer),
        ("kv_overrides", pointer),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
        *_ROOM,
    )


def _context_params(name: str, before_flags: list[tuple[str, Any]]) -> type[c.Structure]:
    """llama_context_params, with the fields that stand between the abort callback and the flags."""
    numbers = (
        ["n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq"],
        ["n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type"],
        ["rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast"],
    )
    fields = [
        *((field, c.c_uint32) for field in numbers[0]),
        *((field, c.c_int32) for field in numbers[1]),
        ("flash_attn_type", c.c_int32),
        *((field, c.c_float) for field in numbers[2]),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", pointer),
        ("cb_eval_user_data", pointer),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("abort_callback", AbortCallback),
        ("abort_callback_data", pointer),
        *before_flags,
        *((flag, c.c_bool) for flag in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full")),
        ("kv_unified", c.c_bool),
        *_ROOM,
    ]
    return type(name, (c.Structure,), {"_fields_": fields})


class Layout(NamedTuple):
    """Structures of some releases."""

    releases: str
    model_params: type[c.Structure]
    context_params: type[c.Structure]


LAYOUTS = (
    Layout("xllamacpp 2026.10", ModelParams, _context_params("ContextParams2026c", [("unnamed", pointer)])),
    Layout("llama-cpp-python 0.3.36", ModelParams, _context_params("ContextParams2026b", [])),
)

# What llama.cpp documents as defaults. A field read at a wrong place does not have all of these.
MODEL_DEFAULTS: Mapping[str, Any] = {
    "devices": None,
    "tensor_buft_overrides": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback_user_data": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}
CONTEXT_DEFAULTS: Mapping[str, Any] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "type_k": 1,
    "type_v": 1,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
}

TYPE_F32, TYPE_F16 = 0, 1  # of ggml, for a cache's keys and values
SPLIT_NONE = 0
FLASH_OFF = 0
LOG_WARNING, LOG_ERROR = 3, 4

# Name: result, arguments. Structures that are passed by value are added by `declare`.
_FUNCTIONS: Mapping[str, tuple[Any, list[Any]]] = {
    "llama_version": (c.c_char_p, []),
    "llama_backend_init": (None, []),
    "llama_supports_gpu_offload": (c.c_bool, []),
    "llama_log_set": (None, [LogCallback, pointer]),
    "llama_model_free": (None, [pointer]),
    "llama_model_get_vocab": (pointer, [pointer]),
    "llama_model_n_embd": (c.c_int32, [pointer]),
    "llama_model_n_head": (c.c_int32, [pointer]),
    "llama_model_n_head_kv": (c.c_int32, [pointer]),
    "llama_model_n_swa": (c.c_int32, [pointer]),
    "llama_model_n_layer": (c.c_int32, [pointer]),
    "llama_model_meta_val_str": (c.c_int32, [pointer, c.c_char_p, c.c_char_p, c.c_size_t]),
    "llama_model_size": (c.c_uint64, [pointer]),
    "llama_model_n_params": (c.c_uint64, [pointer]),
    "llama_model_has_encoder": (c.c_bool, [pointer]),
    "llama_model_has_decoder": (c.c_bool, [pointer]),
    "llama_model_is_recurrent": (c.c_bool, [pointer]),
    "llama_model_is_hybrid": (c.c_bool, [pointer]),
    "llama_model_is_diffusion": (c.c_bool, [pointer]),
    "llama_free": (None, [pointer]),
    "llama_n_ctx": (c.c_uint32, [pointer]),
    "llama_n_batch": (c.c_uint32, [pointer]),
    "llama_n_ubatch": (c.c_uint32, [pointer]),
    "llama_n_seq_max": (c.c_uint32, [pointer]),
    "llama_n_threads": (c.c_int32, [pointer]),
    "llama_set_n_threads": (None, [pointer, c.c_int32, c.c_int32]),
    "llama_set_abort_callback": (None, [pointer, AbortCallback, pointer]),
    "llama_get_memory": (pointer, [pointer]),
    "llama_memory_seq_rm": (c.c_bool, [pointer, sequence, position, position]),
    "llama_memory_seq_cp": (None, [pointer, sequence, sequence, position, position]),
    "llama_memory_seq_pos_min": (position, [pointer, sequence]),
    "llama_state_seq_get_size": (c.c_size_t, [pointer, sequence]),
    "llama_state_seq_get_data": (c.c_size_t, [pointer, pointer, c.c_size_t, sequence]),
    "llama_state_seq_set_data": (c.c_size_t, [pointer, pointer, c.c_size_t, sequence]),
    "llama_decode": (c.c_int32, [pointer, Batch]),
    "llama_get_logits": (pointer, [pointer]),
    "llama_vocab_n_tokens": (c.c_int32, [pointer]),
    "llama_tokenize": (c.c_int32, [pointer, c.c_char_p, c.c_int32, pointer, c.c_int32, c.c_bool, c.c_bool]),
}


def declare(library: Any) -> None:
    """Say what the functions take and give. AttributeError: the library lacks one; the message names it."""
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def declare_layout(library: Any, layout: Layout) -> None:
    """The same for the functions that take or give a structure by value."""
    library.llama_model_default_params.restype = layout.model_params
    library.llama_model_default_params.argtypes = []
    library.llama_context_default_params.restype = layout.context_params
    library.llama_context_default_params.argtypes = []
    library.llama_model_load_from_file.restype = pointer
    library.llama_model_load_from_file.argtypes = [c.c_char_p, layout.model_params]
    library.llama_init_from_model.restype = pointer
    library.llama_init_from_model.argtypes = [pointer, layout.context_params]


def fits(library: Any) -> bool:
    """Whether the library's own defaults are the documented ones, read by the layout declared last."""
    return _has(library.llama_model_default_params(), MODEL_DEFAULTS) and _has(
        library.llama_context_default_params(), CONTEXT_DEFAULTS
    )


def _has(structure: c.Structure, values: Mapping[str, Any]) -> bool:
    return all(getattr(structure, name) == value for name, value in values.items())
