"""What an engine tells of a request, and two tiny members that may be lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from losing_backend import losing
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader

from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.serving.engine import Engine
from deepen_ext.serving.requests import Ended, Event, Failed, Piece, Request
from deepen_ext.serving.running import Running

SECONDS = 60
LOUD: dict[str, Any] = {"learning_rate": 1.0, "cache": False}


class Told:
    """What was told of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._done = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended | Failed):
            self._done.set()

    def wait(self) -> Told:
        assert self._done.wait(SECONDS), self.events
        return self

    def begun(self) -> Told:
        """Once it has a token."""
        while not self.pieces:
            threading.Event().wait(0.002)
        return self

    @property
    def pieces(self) -> list[Piece]:
        return [one for one in self.events if isinstance(one, Piece)]

    @property
    def ids(self) -> list[int]:
        return [one.token for one in self.pieces]

    @property
    def text(self) -> str:
        return "".join(one.text for one in self.events if isinstance(one, Piece | Ended))

    @property
    def last(self) -> Event:
        return self.events[-1]


def submit(engine: Engine, **request: Any) -> Told:
    told = Told()
    engine.submit(Request(**{"model": "deepen", "prompt": PROSE[:30], **request}), told)
    return told


def losing_members(folder: Path) -> list[Member]:
    """A main model and an assistant, each of one token a byte and a context of 400."""
    found = []
    for i, name in enumerate(("main", "assistant")):
        saved = save_model(folder / name, one_byte_tokens(), seed=i)
        found.append(losing(tiny_reader(load_member(saved), name, PROSE[300 * i : 300 * i + 1200], seed=i)))
    return found


def closed_runs(monkeypatch: pytest.MonkeyPatch) -> list[Running]:
    """The runs of engines that are closed from now on."""
    closed: list[Running] = []
    close = Running.close

    def noted(run: Running) -> None:
        close(run)
        closed.append(run)

    monkeypatch.setattr(Running, "close", noted)
    return closed


def counted(member: Member) -> list[int]:
    """The tokens that go through a member's model from now on."""
    count = [0]

    def count_ids(module: Any, args: Any, kwargs: Any) -> None:
        count[0] += kwargs["input_ids"].numel() if "input_ids" in kwargs else args[0].numel()

    member.model.register_forward_pre_hook(count_ids, with_kwargs=True)
    return count
