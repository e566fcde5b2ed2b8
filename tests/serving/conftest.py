"""A server of two tiny models, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from running import Running, serving
from told import losing_members

from deepen_ext import Ensemble
from deepen_ext.members.member import Member


@pytest.fixture(scope="package")
def pair(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen")


@pytest.fixture(scope="package")
def served(pair: Ensemble) -> Iterator[Running]:
    """A server of the tiny pair, its queue large; for tests that leave it as it was."""
    with serving({"deepen": pair}) as running:
        yield running


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Two that may be lost, for tests of the engine by itself."""
    return losing_members(tmp_path_factory.mktemp("models"))


@pytest.fixture
def client(served: Running) -> openai.OpenAI:
    return served.client()
