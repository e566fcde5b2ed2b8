"""A GGUF file's header: its settings and the table of its tensors, checked against the file's size.

Of a list only the length is kept: a vocabulary of 262,144 tokens is walked over in a tenth of a second, and
the weights are never touched.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # of ggml's tensors
_LEAST_BITS = 1  # of a weight, in any of ggml's types


class Damaged(ValueError):
    """The file's numbers do not go together; the message says which."""


class Tensor(NamedTuple):
    """An entry of the table of tensors.

    Attributes:
        shape: sides, the contiguous one first.
        kind: ggml's number of its type.
        begin: bytes from the file's beginning to its first block.
    """

    shape: tuple[int, ...]
    kind: int
    begin: int


class List(NamedTuple):
    """A setting that is a list.

    Attributes:
        kind: GGUF's number of its elements' type.
        length: how many it has.
        begin: bytes from the file's beginning to the first.
    """

    kind: int
    length: int
    begin: int


@dataclass(frozen=True)
class Header:
    """What stands before the weights.

    Attributes:
        settings: by key; of a list its length alone, as a tuple of one number.
        lists: the settings that are lists, by key.
        settings_end: bytes from the file's beginning to the end of the settings.
        tensors: by name.
        weight_bytes: bytes of the file after the header.
    """

    settings: Mapping[str, Any]
    lists: Mapping[str, List]
    settings_end: int
    tensors: Mapping[str, Tensor]
    weight_bytes: int


def read_header(path: Path) -> Header:
    """Read the header; of a file that has not changed, what was read before.

    Raises:
        Damaged: counts, lengths or offsets do not lie inside the file, or it names no architecture.
        OSError: the file cannot be read.
    """
    found = path.stat()
    return _read(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> Header:
    if size < 24:
        raise Damaged("it ends inside its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).read()


def read_texts(path: Path, texts: List) -> Iterator[bytes]:
    """The texts of a list that `read_header` has walked over."""
    length_at, at = struct.Struct("<Q").unpack_from, texts.begin
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(texts.length):
            end = at + 8 + length_at(data, at)[0]
            yield data[at + 8 : end]
            at = end


def read_whole_numbers(path: Path, numbers: List) -> tuple[int, ...]:
    """A list of whole numbers that `read_header` has walked over; () where it is one of something else."""
    form = _SCALARS.get(numbers.kind, "f")
    if form in "fd?":
        return ()
    with path.open("rb") as file:
        file.seek(numbers.begin)
        packed = struct.Struct(f"<{numbers.length}{form}")
        return packed.unpack(file.read(packed.size))


class _Reader:
    """Walks the header; every step is checked against the file's size before it is made."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0
        self._lists: dict[str, List] = {}

    def read(self) -> Header:
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
        settings_end = self._at
        if not isinstance(settings.get("general.architecture"), str):
            raise Damaged("it names no architecture")
        table, begin = self._tensors(tensors, settings.get("general.alignment", 32))
        return Header(settings, self._lists, settings_end, table, max(0, self._size - begin))

    def _tensors(self, count: int, alignment: Any) -> tuple[dict[str, Tensor], int]:
        """The table of tensors, and where the weights begin."""
        table: dict[str, Tensor] = {}
        ends = []
        for _ in range(count):
            name = self._text()
            (dimensions,) = self._numbers("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise Damaged(f"tensor {name!r} has {dimensions} dimensions")
            shape = self._numbers(f"{dimensions}Q")
            kind, offset = self._numbers("IQ")
            elements = math.prod(shape)
            if not 0 < elements <= self._size * 8 // _LEAST_BITS:
                raise Damaged(f"tensor {name!r} has {elements} elements in {self._size} bytes")
            if name in table:
                raise Damaged(f"tensor {name!r} is there twice")
            table[name] = Tensor(shape, kind, offset)
            ends.append((name, offset + elements * _LEAST_BITS // 8))
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise Damaged(f"general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        for name, end in ends:
            if begin + end > self._size:
                raise Damaged(f"tensor {name!r} lies beyond its end")
        return {name: one._replace(begin=begin + one.begin) for name, one in table.items()}, begin

    def _value(self, key: str, kind: int) -> Any:
        """A scalar or text; of an array its length alone, as a tuple."""
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == TEXT:
            return self._text()
        if kind != _ARRAY:
            raise Damaged(f"{key!r} is of the unknown kind {kind}")
        inner, count = self._numbers("IQ")
        self._lists[key] = List(inner, count, self._at)
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == TEXT:
            if count * 8 > self._size - self._at:
                raise Damaged(f"{key!r} has {count} texts")
            self._skip_texts(count)
        else:
            raise Damaged(f"{key!r} is a list of the unknown kind {inner}")
        return (count,)

    def _skip_texts(self, count: int) -> None:
        """Hundreds of thousands of tokens and merges: plain variables, because calls are what takes long."""
        length_at, data, at, last = struct.Struct("<Q").unpack_from, self._data, self._at, self._size - 8
        for _ in range(count):
            if at > last:
                raise Damaged("it ends inside its header")
            at += 8 + length_at(data, at)[0]
        self._skip(at - self._at)

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
