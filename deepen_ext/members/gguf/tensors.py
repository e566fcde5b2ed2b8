"""Tensors of a GGUF file, read one by one where they lie."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepen_ext.errors import ModelError
from deepen_ext.members.gguf.checks import check_gguf

_SAMPLES = 1024  # bytes of each tensor, in a fingerprint
_AT_ONCE = 1 << 17  # values: gguf by itself takes 16 rows at a time, which is five times as slow


def dense_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor as float32, the values that its blocks stand for; in the shape that torch would give it.

    Raises:
        ModelError: the file has no such tensor, or the package `gguf` is missing or does not know its type.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelError(
            f"{path}: reading weights needs the package gguf; install it with: pip install 'deepen-ext[demo]'"
        ) from error
    header = check_gguf(path, weights=True)
    if name not in header.tensors:
        raise ModelError(f"{path}: it has no tensor {name}")
    entry = header.tensors[name]
    width, *others = entry.shape
    try:
        kind = GGMLQuantizationType(entry.kind)
        block, size = GGML_QUANT_SIZES[kind]
        rows, at_once = math.prod(others), max(1, _AT_ONCE // width)
        blocks = np.memmap(path, np.uint8, "r", entry.begin, (rows, width // block * size))
        values = np.empty((rows, width), np.float32)
        for first in range(0, rows, at_once):
            some: Any = blocks[first : first + at_once]
            values[first : first + at_once] = dequantize(some.reshape(1, -1), kind).reshape(-1, width)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{path}: {name} has weights of a type that gguf cannot read: {error}") from error
    return torch.from_numpy(values).reshape(*reversed(entry.shape))


def hash_weights(path: Path, dtype: torch.dtype) -> str:
    """sha256 (hex) over names, shapes and values of all tensors, rounded to a dtype; errors as above."""
    digest = hashlib.sha256()
    for name in sorted(check_gguf(path, weights=True).tensors):
        values = dense_tensor(path, name).to(dtype).float()
        digest.update(f"{name} {list(values.shape)} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def hash_samples(path: Path) -> str:
    """sha256 (hex) over the table of tensors and up to 1,024 evenly spaced bytes of each."""
    table = sorted(check_gguf(path, weights=True).tensors.items(), key=lambda one: one[1].begin)
    data = np.memmap(path, np.uint8, "r")
    ends = [entry.begin for _, entry in table[1:]] + [len(data)]
    digest = hashlib.sha256()
    for (name, entry), end in zip(table, ends, strict=True):
        digest.update(f"{name} {entry.shape} {entry.kind} ".encode())
        own = data[entry.begin : end]
        digest.update(own[:: max(len(own) // _SAMPLES, 1)].tobytes())
    return digest.hexdigest()
