"""What Ray would wait minutes for is refused at once: a cluster that is not there any more."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deepen_ext.cluster.connect import connect
from deepen_ext.errors import InputError


@pytest.fixture
def dead() -> str:
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _not_connected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is started here either: Ray must not be asked to join what is not there."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10


def test_the_one_that_a_file_names(tmp_path: Path, dead: str) -> None:
    """Ray leaves it where a cluster is killed."""
    note = tmp_path / "ray" / "ray_current_cluster"
    note.write_text(dead)
    for address in (None, "auto"):
        with pytest.raises(
            InputError, match=rf"no Ray cluster answers at '{dead}' .*{note} names.*Remove it"
        ):
            connect(address)
    note.unlink()
    assert connect(None) is ray


def test_the_one_that_a_file_in_tmpdir_names(
    tmp_path: Path, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "ray" / "ray_current_cluster").write_text(dead)
    with pytest.raises(InputError, match=f"no Ray cluster answers at '{dead}'"):
        connect(None)


def test_the_one_that_the_environment_names(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"ray://{dead}")
    with pytest.raises(InputError, match=r"no Ray cluster answers at 'ray://.*RAY_ADDRESS names"):
        connect(None)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert connect(None) is ray


def test_the_one_that_was_asked_for(dead: str) -> None:
    with pytest.raises(InputError, match=f"no Ray cluster answers at '{dead}'"):
        connect(dead)
    with socket.create_server(("127.0.0.1", 0)) as there:
        assert connect(f"127.0.0.1:{there.getsockname()[1]}") is ray
    assert connect("local") is ray
