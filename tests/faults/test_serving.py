"""A server whose member runs out of memory tells which, and goes on; what is told at a server's end."""

from __future__ import annotations

import logging
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from faulty_members import PROMPT, arm, check_free, ensemble_of, failing, members_of
from kills import TESTS
from losing_backend import backend_of

from deepen_ext.decoding.open_run import OpenRun
from deepen_ext.errors import OutOfMemory
from deepen_ext.members.member import Member

sys.path.append(str(TESTS / "serving"))
from running import Running, serving, until

pytestmark = pytest.mark.slow
NEW = 6
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12"
SAID = "the member tiny-2 ran out of memory; send fewer texts at once, or shorter ones"


@pytest.fixture(scope="module")
def members(one_byte_folders: list[Path]) -> list[Member]:
    return members_of(one_byte_folders)


@pytest.fixture(scope="module")
def served(members: list[Member]) -> Iterator[Running]:
    with serving({"deepen": ensemble_of(members)}, engine={"lanes": 4, "prompt_chunk": 16}) as running:
        yield running


@cache
def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


def ask(served: Running, prompt: str = PROMPT, **more: Any) -> str:
    """A text, or the error that came in its place."""
    client = _client(served.url)
    asked = {"model": "deepen", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
    try:
        if not more.get("stream"):
            return client.completions.create(**asked).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked))
    except openai.APIStatusError as error:
        again = "" if error.response.headers.get("retry-after") else ", without Retry-After"
        status = "" if error.status_code == 503 else f" {error.status_code}"
        return f"{error.code}: {error.body['message']}{status}{again}"  # type: ignore[call-overload,index]
    except openai.APIError as error:  # in a stream that has begun
        return f"{error.code}: {error.message}"


@pytest.mark.parametrize(("at", "error"), [(0, MemoryError), (4, lambda: RuntimeError(CPU))])
def test_texts_are_written_and_one_is_read(
    served: Running, members: list[Member], at: int, error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ways = [{"stream": True}, {}, {"prompt": "c" * 300, "stream": True}]
    whole = [ask(served, **way) for way in ways]
    tokens = served.service.engine.load.tokens
    arm(members)
    caplog.set_level(logging.INFO, "deepen_ext.serving")
    with failing(members[1], at, error) as forwards, ThreadPoolExecutor(3) as pool:
        found = [one.result(30) for one in [pool.submit(ask, served, **way) for way in ways]]
    assert forwards[0] > at
    failed = [one for one in found if one == f"out_of_memory: {SAID}"]
    assert failed
    assert all(one in failed or one == own for one, own in zip(found, whole, strict=True))
    assert served.idle()
    assert until(lambda: caplog.text.count(": failed, 0 of 1 texts") == len(failed))  # told after the answer
    assert [ask(served, **way) for way in ways] == whole
    assert served.service.engine.load.tokens > tokens


def test_caches_are_free(served: Running, members: list[Member]) -> None:
    whole = ask(served)
    arm(members)
    with failing(members[1], 5, MemoryError):
        assert SAID in ask(served, "d" * 200)
    assert served.idle()
    assert served.service.engine.load.bytes_held == 0
    check_free(members)
    assert ask(served) == whole


def test_a_run_that_cannot_be_closed_well(
    served: Running, monkeypatch: pytest.MonkeyPatch, members: list[Member]
) -> None:
    """Its texts have their error, and the engine's thread goes on."""
    whole, close = ask(served), OpenRun.close

    def fail(run: OpenRun) -> None:
        close(run)
        raise MemoryError

    arm(members)
    with failing(members[1], 5, MemoryError), monkeypatch.context() as patch:
        patch.setattr(OpenRun, "close", fail)
        assert SAID in ask(served)
    assert ask(served) == whole


def test_nothing_is_under_way_when_a_prompt_cannot_be_read(members: list[Member]) -> None:
    """The main model was asked already when the assistant's forward failed."""
    engine = {"lanes": 2, "prompt_chunk": 4}
    with serving({"deepen": ensemble_of(members)}, engine=engine) as own:
        arm(members)
        with failing(members[1], 0, MemoryError):
            assert SAID in ask(own, "e" * 60)
        (session,) = backend_of(members[0]).sessions
        assert until(lambda: session.closed)
        assert backend_of(members[0]).calls.count("wait") == 1


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("second", [False, True])
def test_the_end_comes_in_a_long_forward(members: list[Member], at: int, second: bool) -> None:
    """Clients are told, though the engine cannot look up: when the grace is over, or at a second signal."""
    go_on = threading.Event()

    def wait(*_: Any) -> None:
        forwards.append(0)
        if len(forwards) == at + 1:
            go_on.wait(30)

    forwards: list[int] = []
    arm(members)
    handle = members[1].model.model.layers[-1].register_forward_pre_hook(wait)
    try:
        with serving({"deepen": ensemble_of(members)}, grace=0) as own, ThreadPoolExecutor(1) as pool:
            own.server.config.timeout_graceful_shutdown = 20 if second else 1
            asked = pool.submit(ask, own, stream=True, max_tokens=60)
            assert until(lambda: len(forwards) == at + 1)
            for _ in range(1 + second):
                own.server.handle_exit(signal.SIGTERM, None)
            assert asked.result(10) == "shutting_down: the server is shutting down"
            go_on.set()
    finally:
        go_on.set()
        handle.remove()
    own.service.engine.close()  # a server that ends at once does not wait for it
    check_free(members)


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(OutOfMemory("x", "MemoryError")))
    assert str(error).startswith("x: its forward pass ran out of memory (MemoryError)")
