"""A GGUF file's own numbers against its size: before a reader allocates, loops or builds layers by them."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # of ggml's tensors
_LEAST_BITS = 1  # of a weight, in any of ggml's types
_TOKENS = "tokenizer.ggml.tokens"
# Settings that count something that the file's tensors have; no tensor has as many elements along a side.
_SIZES = ("_length", "_count", "_count_kv", "vocab_size", "_size", ".dimension_count", "_rank")
_NO_SIZES = ("context_length", "original_context_length")  # of positions: nothing is allocated by them


class Damaged(ValueError):
    """The file's numbers do not go together; the message says which."""


def check_gguf(path: Path, *, weights: bool) -> None:
    """That a GGUF file's counts, lengths and offsets lie inside it and its sizes are those of its tensors.

    Args:
        path: the file.
        weights: whether a model is to be made of it; files of a tokenizer alone have none.

    Raises:
        Damaged: they do not.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise Damaged("it ends inside its header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Reader(data).check(weights)


class _Reader:
    """Walks the header; every step is checked against the file's size before it is made."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0

    def check(self, weights: bool) -> None:
        magic, version, tensors, pairs = self._numbers("4sIQQ")
        if magic != b"GGUF":
            raise Damaged("it does not begin with GGUF")
        if version not in _VERSIONS:
            raise Damaged(f"its version is {version}; versions 2 and 3 are read")
        # The least that a tensor's entry and a key with its value take.
        if tensors * 24 + pairs * 13 > self._size:
            raise Damaged(f"it has {tensors} tensors and {pairs} settings in {self._size} bytes")
        settings: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            settings[key] = self._value(key, *self._numbers("I"))
        shapes = self._tensors(tensors, settings.get("general.alignment", 32))
        if not isinstance(settings.get("general.architecture"), str):
            raise Damaged("it names no architecture")
        if weights:
            _check_settings(settings, shapes)

    def _tensors(self, count: int, alignment: Any) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        ends = []
        for _ in range(count):
            name = self._text()
            (dimensions,) = self._numbers("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise Damaged(f"tensor {name!r} has {dimensions} dimensions")
            shape = self._numbers(f"{dimensions}Q")
            _, offset = self._numbers("IQ")
            elements = math.prod(shape)
            if not 0 < elements <= self._size * 8 // _LEAST_BITS:
                raise Damaged(f"tensor {name!r} has {elements} elements in {self._size} bytes")
            if name in shapes:
                raise Damaged(f"tensor {name!r} is there twice")
            shapes[name] = shape
            ends.append((name, offset + elements * _LEAST_BITS // 8))
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise Damaged(f"general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        for name, end in ends:
            if begin + end > self._size:
                raise Damaged(f"tensor {name!r} lies beyond its end")
        return shapes

    def _value(self, key: str, kind: int) -> Any:
        """A scalar or text; of an array its length alone, as a tuple."""
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise Damaged(f"{key!r} is of the unknown kind {kind}")
        inner, count = self._numbers("IQ")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            if count * 8 > self._size - self._at:
                raise Damaged(f"{key!r} has {count} texts")
            for _ in range(count):
                self._skip(*self._numbers("Q"))
        else:
            raise Damaged(f"{key!r} is a list of the unknown kind {inner}")
        return (count,)

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        begin = self._at
        self._skip(length)
        try:
            return self._data[begin : self._at].decode()
        except UnicodeDecodeError as error:
            raise Damaged("a text in it is not UTF-8") from error

    def _numbers(self, form: str) -> tuple[Any, ...]:
        begin = self._at
        self._skip(struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{form}", self._data, begin)

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise Damaged("it ends inside its header")
        self._at += count


def check_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """That the weights, by name, are numbers.

    Raises:
        Damaged: some are not.
    """
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise Damaged(f"{name} has values that are no numbers")


def _check_settings(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Layers are built by these numbers before any weight is read."""
    if not shapes:
        raise Damaged("it has no weights")
    architecture = settings["general.architecture"]
    widest = max(side for shape in shapes.values() for side in shape)
    blocks = {name.split(".")[1] for name in shapes if name.startswith(("blk.", "enc.", "dec."))}
    for key, value in settings.items():
        if not key.startswith(f"{architecture}.") or not isinstance(value, int):
            continue
        last = key.removeprefix(f"{architecture}.")
        counts = last.endswith(_SIZES) and last.rpartition(".")[2] not in _NO_SIZES
        right = 0 < value <= len(blocks) + 1 if last == "block_count" else not counts or 0 <= value <= widest
        if not right:
            raise Damaged(f"{key} is {value}, which its tensors do not have")
    width = settings.get(f"{architecture}.embedding_length")
    embedding = shapes.get("token_embd.weight")
    if embedding is not None and isinstance(width, int) and width not in embedding:
        raise Damaged(f"{architecture}.embedding_length is {width}; its token embeddings have {embedding[0]}")
    positions, longest = shapes.get("position_embd.weight"), settings.get(f"{architecture}.context_length")
    if positions is not None and isinstance(longest, int) and longest not in positions:
        raise Damaged(f"{architecture}.context_length is {longest}; it has {positions[-1]} positions")
    vocabulary = settings.get(_TOKENS)
    if embedding is not None and isinstance(vocabulary, tuple) and vocabulary[0] > embedding[-1]:
        raise Damaged(f"it has {vocabulary[0]} tokens and {embedding[-1]} token embeddings")
