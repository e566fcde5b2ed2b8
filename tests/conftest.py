"""Fixtures that every test shares: the embedded models, fetched, converted and loaded once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# `make test` shares the files between processes, whose threads must not keep each other from the processor.
# OpenMP reads both when torch is imported, and what tests start inherits them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from deepen_ext import demo
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted."""
    return demo.embedded("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_dir() -> Path:
    """Folder of Gemma-3-270M, converted."""
    return demo.embedded("gemma-3-270m")


@pytest.fixture(scope="session")
def qwen_tokenizer_dir() -> Path:
    """Folder with the tokenizer of Qwen2.5-Coder-0.5B-Instruct; the weights may be missing."""
    return demo.embedded("qwen2.5-coder-0.5b-instruct", tokenizer_only=True)


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Member:
    """SmolLM2-135M-Instruct, float32, CPU. Read only."""
    return load_member(smollm2_dir)


@pytest.fixture(scope="session")
def gemma(gemma_dir: Path) -> Member:
    """Gemma-3-270M, float32, CPU. Read only."""
    return load_member(gemma_dir)
