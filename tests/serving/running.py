"""A real server on a real socket, in a thread of this process, over tiny models."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from typing import Any

import openai
from sessions import changed

from deepen_ext import Ensemble
from deepen_ext.members.member import Member
from deepen_ext.serving import engine as engines
from deepen_ext.serving.models import Models, with_members
from deepen_ext.serving.run import WebServer
from deepen_ext.serving.service import Limits, Service

MAIN, ASSISTANT = "tiny-smollm2", "tiny-gemma"
PROMPT = "The lighthouse stood at the end of"


@dataclass
class Running:
    """A server that listens."""

    service: Service
    server: WebServer
    ensembles: Mapping[str, Ensemble]
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **more})

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON and headers; a body is sent as JSON, bytes as they are."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
            reply = connection.getresponse()
            text = reply.read()
        finally:
            connection.close()
        known = {key.lower(): value for key, value in reply.getheaders()}
        found = json.loads(text) if known.get("content-type", "").startswith("application/json") else text
        return reply.status, found, known

    def refused(self, path: str, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
        """The error that comes with this status."""
        got, answer, _ = self.ask(path, body, **headers)
        assert got == status, answer
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"]
        return dict(error)

    def raw(self) -> socket.socket:
        """A connection by itself."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing is written or waits any more, within so long."""
        return until(lambda: self.busy() == 0, seconds)

    def busy(self) -> int:
        """How many texts are asked for now."""
        load = self.service.engine.load
        return load.running + load.reading + load.waiting


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes true within so long."""
    end = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return done


@contextmanager
def serving(
    ensembles: Mapping[str, Ensemble],
    *,
    grace: float = 5.0,
    engine: dict[str, int] | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """A server of these ensembles and their members, until the block ends."""
    models = with_members(ensembles)
    service = Service(engines.Engine(models, **(engine or {})), Models(models, 1), Limits(**limits))
    server = WebServer(service, host="127.0.0.1", port=0, grace=grace)
    listening = server.bind()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    running = Running(service, server, ensembles, listening.getsockname()[1], thread)
    assert until(lambda: server.started)
    try:
        yield running
    finally:
        server.grace = 0.0
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def slow(member: Member, seconds: float) -> Member:
    """The member, whose every step takes this much longer."""
    backend = changed(member).backend
    opened = type(backend).open

    class Slow(type(backend)):  # type: ignore[misc]
        def open(self, lanes: int = 1, capacity: int = 0) -> Any:
            session = opened(self, lanes, capacity)
            ask = session.ask

            def slowly(*given: Any, **more: Any) -> Any:
                time.sleep(seconds)
                return ask(*given, **more)

            session.ask = slowly
            return session

    facts = {key: value for key, value in vars(backend).items() if not key.startswith("_")}
    made = Slow.__new__(Slow)
    vars(made).update(vars(backend) | facts)
    return replace(member, backend=made)
