"""Clients that vanish, read slowly, send halves or far too much; and how the server ends."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from command_line import COMMAND, ROOT
from running import PROMPT, Running, serving, slow, until

from deepen_ext import Ensemble
from deepen_ext.serving.engine import Ticket
from deepen_ext.serving.listening import Texts, TooSlow, most_waiting
from deepen_ext.serving.requests import Candidate, Ended, Piece, Request, Scored
from deepen_ext.serving.run import PatientProtocol
from deepen_ext.serving.writing import Writing

COMPLETION: dict[str, Any] = {"model": "deepen", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}


def post(connection: socket.socket, **more: Any) -> None:
    body = json.dumps({**COMPLETION, **more}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


@pytest.fixture(scope="module")
def crawling(pair: Ensemble) -> Iterator[Running]:
    """20 ms a step more."""
    ensemble = Ensemble([slow(pair.members[0], 0.02), pair.members[1]], fuser="deepen")
    with serving({"deepen": ensemble}, engine={"lanes": 8}) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_leaves_nothing_behind(crawling: Running, stream: bool) -> None:
    before = crawling.service.engine.load.tokens
    for _ in range(3):
        connection = crawling.raw()
        post(connection, max_tokens=300, stream=stream)
        assert until(lambda: crawling.service.engine.load.running > 0)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.close()
        assert crawling.idle(5)
    assert crawling.service.engine.load.tokens - before < 3 * 200
    assert crawling.ask("/v1/completions", COMPLETION)[0] == 200


def test_256_streams_at_once(served: Running, pair: Ensemble) -> None:
    expected = pair.generate(PROMPT, max_new_tokens=4, draft=0).text

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(stream=True, **COMPLETION)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            return list(await asyncio.gather(*(one(client) for _ in range(256))))

    assert set(asyncio.run(all_of_them())) == {expected}
    assert served.idle()


def test_half_requests(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops in the middle is ended after a while; others are answered meanwhile."""
    monkeypatch.setattr(PatientProtocol, "patience", 0.3)
    silent, half, refused = served.raw(), served.raw(), served.raw()
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
    refused.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n{")
    assert refused.recv(1000).startswith(b"HTTP/1.1 413")
    assert served.ask("/v1/completions", COMPLETION)[0] == 200
    assert half.recv(1000).startswith(b"HTTP/1.1 408")
    for one in (silent, half, refused):
        one.settimeout(5)
        while one.recv(1000):  # until it is closed
            pass
        one.close()
    with served.raw() as garbage:
        garbage.sendall(b"\x16\x03\x01\x00\xa5 what\r\n\r\n")
        assert garbage.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_client_that_would_like_http_2(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    """It gets HTTP/1.1, and the log no advice about WebSockets with each request."""
    wish = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    try:
        status, answer, _ = served.ask("/v1/completions", COMPLETION, **wish)
    finally:
        logger.removeHandler(caplog.handler)
    assert status == 200, answer
    assert "pgrade" not in caplog.text


def test_50_mb_of_a_body(served: Running) -> None:
    """They are never held: the process grows by much less."""
    served.ask("/v1/completions", COMPLETION)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = b""
    with served.raw() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        block = b"10000\r\n" + b" " * 65536 + b"\r\n"
        try:
            for _ in range(800):
                connection.sendall(block)
            status = connection.recv(100)
        except OSError:  # it was closed in the meantime
            status = b"HTTP/1.1 413"
    assert status.startswith(b"HTTP/1.1 413")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB
    assert served.refused("/v1/completions", b" " * 50_000_000, 413)
    assert served.ask("/v1/completions", COMPLETION)[0] == 200


class _Ticket(Ticket):
    prompt_tokens = 1

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


def test_what_waits_for_a_slow_reader_is_bounded() -> None:
    """The engine's thread is never held up; past the bound the texts are cancelled."""

    async def read() -> None:
        texts = Texts(2, 10)
        ticket = _Ticket()
        listeners = []

        class Engine:
            def submit(self, request: Any, listener: Any) -> Ticket:
                listeners.append(listener)
                return ticket

        texts.submit(Engine(), [None, None])  # type: ignore[arg-type, list-item]
        for _ in range(2):
            for i in range(10):
                listeners[i % 2](Piece(i, "x"))
            assert [one.event.token for one in await texts.next()] == list(range(10))  # type: ignore[union-attr]
        for i in range(100_000):
            listeners[0](Piece(i, "x"))
        assert len(texts._events) <= 11
        with pytest.raises(TooSlow):
            await texts.next()
        assert ticket.cancelled.is_set()

    asyncio.run(read())


@pytest.mark.parametrize(
    ("texts", "request_"),
    [
        (1, {}),
        (128, {"top": 128}),
        (32, {"draft": 32, "top": 20}),
        (32, {"draft": 8, "explain": True}),
    ],
)
def test_what_one_step_brings_may_wait(texts: int, request_: dict[str, Any]) -> None:
    """Of all texts of a request, however much each token's piece has."""
    request = Request("deepen", "So", **request_)
    top = tuple(Candidate(i, -1.0) for i in range(request.top))
    piece = Piece(1, "x", Scored(-1.0, top) if top else None, {} if request.explain else None)

    async def read() -> None:
        told = Texts(texts, most_waiting([request] * texts))
        listeners = []

        class Engine:
            def submit(self, request: Any, listener: Any) -> _Ticket:
                listeners.append(listener)
                return _Ticket()

        told.submit(Engine(), [request] * texts)  # type: ignore[arg-type]
        for listener in listeners:
            for _ in range(1 + request.draft):  # type: ignore[operator]
                listener(piece)
        assert len(await told.next()) == texts * (1 + request.draft)  # type: ignore[operator]

    asyncio.run(read())


def test_a_slow_reader_holds_nobody_up(pair: Ensemble) -> None:
    """Its socket is full, and others get their texts; when it goes, its text goes."""
    with serving({"deepen": pair}) as running:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", running.port))
        post(connection, max_tokens=100, explain=True, stream=True, n=4, logprobs=5)
        for _ in range(3):
            status, answer, _ = running.ask("/v1/completions", COMPLETION)
            assert status == 200, answer
        connection.close()
        assert running.idle()


@pytest.mark.parametrize(
    ("stops", "pieces", "told"),
    [
        (["END"], ["one E", "N two", " EN", "D three"], ["one ", "EN two", " ", "", ""]),
        (["aab"], ["aa", "a", "b"], ["", "a", "", ""]),
        (["b", "abc"], ["xa", "bc"], ["x", "", ""]),
        ([], ["a", "b"], ["a", "b", ""]),
    ],
)
def test_stop_strings_are_held_back(stops: list[str], pieces: list[str], told: list[str]) -> None:
    writing = Writing(stops)
    found = [writing.add([Piece(1, one)]).text for one in pieces]
    reason = "stop_string" if stops else "length"
    found.append(writing.end(Ended(reason, "", 1, len(pieces), 0)).text)  # type: ignore[arg-type]
    assert found == told


def start(folder: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    """`deepen-ext serve` in a process, and its port."""
    command = [*COMMAND, "serve", "--model", str(folder), "--fuser", "single", "--port", "0", *more]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "serves" in line:
            return process, int(line.rsplit(":", 1)[1].split("/")[0])
    raise AssertionError(process.wait())


def exit_code(process: subprocess.Popen[str]) -> int:
    """Its exit code; where it does not end, what its threads are doing is the error."""
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(process.communicate()[1]) from None


@pytest.fixture
def member_dir(tiny_smollm2_dir: Path) -> Path:
    return tiny_smollm2_dir


def test_sigterm_ends_it_well(member_dir: Path) -> None:
    """What is being written is finished, new requests are refused, and the exit code is 0."""
    process, port = start(member_dir, "--grace", "20")
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        whole = client.completions.create(**{**COMPLETION, "max_tokens": 150}).choices[0].text
        kept = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        stream = iter(kept.completions.create(stream=True, **{**COMPLETION, "max_tokens": 150}))
        text = next(stream).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(one.choices[0].text for one in stream)
        assert text == whole
        assert exit_code(process) == 0
        with pytest.raises(openai.APIConnectionError):
            client.completions.create(**COMPLETION)
    finally:
        process.kill()
        process.communicate()


def test_after_the_grace_texts_are_cut_off(pair: Ensemble) -> None:
    """A stream ends with an error that says so; it does not just break off."""
    crawling = Ensemble([slow(pair.members[0], 0.05), pair.members[1]], fuser="deepen")
    with serving({"deepen": crawling}, grace=0.5) as running:
        stream = iter(running.client().completions.create(stream=True, **{**COMPLETION, "max_tokens": 200}))
        next(stream)
        kept = running.raw()  # a connection from before
        kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 200 " in kept.recv(1000)
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_a_second_signal_ends_it_at_once(pair: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a stream is open, which closed listeners wait for since Python 3.12."""

    async def as_in_python_3_12(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("asyncio.base_events.Server.wait_closed", as_in_python_3_12)
    crawling = Ensemble([slow(pair.members[0], 0.05), pair.members[1]], fuser="deepen")
    with serving({"deepen": crawling}, grace=60) as running:
        stream = iter(running.client().completions.create(stream=True, **{**COMPLETION, "max_tokens": 300}))
        next(stream)
        running.server.handle_exit(signal.SIGTERM, None)
        assert until(lambda: running.service.closing)
        running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        running.thread.join(10)
        assert not running.thread.is_alive()
        running.service.engine.close()


def test_a_closing_server_refuses(pair: Ensemble) -> None:
    with serving({"deepen": pair}) as running:
        running.service.closing = True
        status, answer, headers = running.ask("/v1/completions", COMPLETION)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in headers
        assert running.ask("/health")[0] == 503


def test_nothing_is_left_over_many_requests(served: Running) -> None:
    """Threads, files and objects of requests."""

    def ask(count: int) -> None:
        for i in range(count):
            with served.raw() as connection:
                post(connection, stream=bool(i % 2), max_tokens=4 if i % 5 else 100)
                told = b""
                while i % 5 and not told.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}}")):
                    told += connection.recv(65536)
        assert served.idle()

    def count() -> tuple[int, int, int]:
        gc.collect()
        held = sum(type(one) is Texts for one in gc.get_objects())
        return threading.active_count(), len(os.listdir("/proc/self/fd")), held

    ask(10)
    assert until(lambda: count()[2] == 0)
    before = count()
    ask(30)
    assert until(lambda: all(now <= then for now, then in zip(count(), before, strict=True))), (
        before,
        count(),
    )
