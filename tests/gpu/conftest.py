"""Tests that need a CUDA device: all are marked `gpu`, left out of `make test` and run by `make gpu-test`.

They need torch, pytest, transformers (for sessions), the package and what built it (nvcc, cmake and ninja:
libdeepen is built for this card, in the time of the first test that uses it): no network, no embedded models.
Random weights have the shapes of real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from pathlib import Path

import guard
import pytest
import torch

from deepen_ext import _core

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "ops"))  # the CPU tests' inputs, for the same cases here


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The guard, for the tests of this folder: pytest asks every conftest about every test."""
    if HERE not in item.path.parents:
        return (yield)
    return (yield from guard.pytest_runtest_protocol(item))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def _a_device_is_there(request: pytest.FixtureRequest) -> None:
    """`-m gpu` asks for a device: without one nothing is skipped in silence, and the first test says why."""
    missing = ""
    if not _core.cuda_compiled():
        missing = "this build of deepen-ext has no CUDA part: make gpu-build"
    elif not torch.cuda.is_available() or _core.cuda_device_count() == 0:
        missing = "no CUDA device: the tests marked gpu need one"
    if missing:
        request.session.shouldfail = missing  # pytest.exit would lose the message under pytest-xdist
        pytest.fail(missing, pytrace=False)


@pytest.fixture
def device() -> str:
    return "cuda:0"


@pytest.fixture
def no_waiting() -> Callable[[], object]:
    """A context in which anything that makes the host wait for the device raises."""

    class NoWaiting:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return NoWaiting
