"""Reading a GGUF file once, where transformers' conversion would read it twice and slowly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """While a model is converted, its file is parsed once and the table of tensor names is made once.

    transformers parses the whole file for the config and again for the weights, and makes the table for every
    module of the model. And the gguf package slices a memory map for each of a vocabulary's words: as a plain
    array over the same memory, that takes a third of the time.
    """
    package: Any = import_module("gguf")
    before = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader = lru_cache(maxsize=1)(_plain_reader(package.GGUFReader))
    package.get_tensor_name_map = lru_cache(package.get_tensor_name_map)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = before


def _plain_reader(reader: Any) -> Any:
    import numpy as np

    class PlainReader(reader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "data":  # the memory map, which the plain array keeps open
                value = np.asarray(value)
            super().__setattr__(name, value)

    return PlainReader
