"""Threads that share maps, under ThreadSanitizer. libFuzzer's targets are left to `make fuzz`: building them
takes a minute."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest
from counting import SCALE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> Path:
    return programs.build_threads()


def test_threads_share_maps(built: Path) -> None:
    found = programs.threads(built, int(16 * SCALE))
    assert found.finding == ""
    assert found.calls == 4 * int(16 * SCALE)


def test_a_race_is_seen(built: Path) -> None:
    """Threads on one fusion, which deepen.h forbids."""
    assert "SUMMARY: ThreadSanitizer: data race" in programs.threads(built, 20, "race").finding
