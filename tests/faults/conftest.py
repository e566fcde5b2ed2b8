"""Fixtures of the tests of faults."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_searched() -> Iterator[None]:
    """Some collect garbage after each of hundreds of faults, in a process with whole vocabularies in it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
