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
        _check_epsilons(header.settings)
        _check_tokenizer(path, header)
        for name, tensor in header.tensors.items():
            _check_type(name, tensor)


def _check_epsilons(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key.endswith("epsilon") and not (isinstance(value, float) and 0 <= value < math.inf):
            raise Damaged(f"{key} is {value}")


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
