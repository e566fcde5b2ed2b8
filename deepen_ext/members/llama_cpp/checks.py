"""What llama.cpp takes for granted of a file. Where it is not so, llama.cpp ends the whole process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepen_ext.members.gguf.checks import TOKENS, check_gguf, failures_of_reading
from deepen_ext.members.gguf.facts import KINDS
from deepen_ext.members.gguf.header import TEXT, Damaged, Header, Tensor, read_texts

_FLOAT32 = 0
# Lists of the tokenizer, and the kind that their elements have.
_LISTS = {
    TOKENS: TEXT,
    "tokenizer.ggml.merges": TEXT,
    "tokenizer.ggml.token_type": 5,  # int32
    "tokenizer.ggml.scores": 6,  # float32
}
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_MOST_LAYERS = 512
_ONE_FOR_EACH_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
# Types that ggml stores and has no product for: integers, float64, and the blocks of activations.
_NO_WEIGHTS = {9, 15, 24, 25, 26, 27, 28}
_TABLES_OF_INDICES = ("tid2eid", "d2t")  # which may have integers
_ADDED_OR_MULTIPLIED = ("_norm.weight", ".bias", "conv1d.weight")  # element by element, not as a matrix


def check_for_llama_cpp(path: Path) -> None:
    """That llama.cpp can load a file and compute with it, or refuse it by itself.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, or llama.cpp would end the process over one of its settings or weights.
    """
    advice = "Fetch the file again if it may be damaged, or use backend='transformers'"
    with failures_of_reading(path, "llama.cpp cannot run this GGUF file", advice):
        header = check_gguf(path, weights=True)
        _check_settings(header.settings)
        _check_tokenizer(path, header)
        for name, tensor in header.tensors.items():
            _check_type(name, tensor)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """What llama.cpp asserts of them (`llama_model::load_hparams`, and ggml of every epsilon)."""
    architecture = settings["general.architecture"]
    for key, value in settings.items():
        if key.endswith("epsilon") and not (isinstance(value, float) and 0 <= value < math.inf):
            raise Damaged(f"{key} is {value}")
    scaling = settings.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        raise Damaged(f"{architecture}.rope.scaling.type is {scaling!r}, none of {', '.join(_ROPE_SCALINGS)}")

    def count(name: str) -> int:
        """A setting that may be missing, or be a list with a number for each layer (then 1)."""
        found = settings.get(f"{architecture}.{name}", 0)
        return found if isinstance(found, int) else 1

    heads = count("attention.head_count")
    width = count("attention.key_length") or count("embedding_length") // max(heads, 1)
    widest = max(width, count("attention.key_length_swa"))
    for name in ("rope.dimension_count", "rope.dimension_count_swa"):
        turned = settings.get(f"{architecture}.{name}")
        # With 0 llama.cpp never ends.
        if heads and isinstance(turned, int) and not (0 < turned <= widest and turned % 2 == 0):
            raise Damaged(f"{architecture}.{name} is {turned}, of heads that are {widest} wide")
    layers, further = count("block_count"), count("nextn_predict_layers")
    if layers > _MOST_LAYERS or further > layers:
        raise Damaged(f"it has {layers} layers, {further} of them for further tokens")
    experts, groups = count("expert_count"), count("expert_group_count")
    used, used_groups = count("expert_used_count"), count("expert_group_used_count")
    right = 0 < used <= experts and groups < experts if experts else used == groups == 0
    if groups > 1:
        right = right and experts % groups == 0 and 0 < used_groups < groups
    if not right:
        raise Damaged(f"{used} of {experts} experts in {used_groups} of {groups} groups do not go together")


def _check_tokenizer(path: Path, header: Header) -> None:
    for key, kind in _LISTS.items():
        if key in header.settings and (key not in header.lists or header.lists[key].kind != kind):
            raise Damaged(f"{key} is no list, or a list of another kind")
    tokens = header.lists.get(TOKENS)
    if tokens is None:
        return
    for key in _ONE_FOR_EACH_TOKEN:
        if key in header.lists and header.lists[key].length != tokens.length:
            raise Damaged(f"{key} has {header.lists[key].length} entries for {tokens.length} tokens")
    seen: set[bytes] = set()
    for text in read_texts(path, tokens):
        if text in seen:
            raise Damaged(f"two of its tokens are {text.decode(errors='replace')!r}")
        if text:  # llama.cpp gives those without text names of their own
            seen.add(text)


def _check_type(name: str, tensor: Tensor) -> None:
    kind = KINDS.get(tensor.kind, f"type {tensor.kind}")
    if tensor.kind in _NO_WEIGHTS and not any(one in name for one in _TABLES_OF_INDICES):
        raise Damaged(f"{name} is {kind}, which is no type of weights")
    elementwise = len(tensor.shape) == 1 or name.endswith(_ADDED_OR_MULTIPLIED)
    if elementwise and tensor.kind != _FLOAT32 and tensor.kind not in _NO_WEIGHTS:
        raise Damaged(f"{name} is {kind}; llama.cpp wants float32 there")
