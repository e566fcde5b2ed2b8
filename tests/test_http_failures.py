"""What goes wrong between a member's server and us: an error that names the member, and nothing is left."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from http_servers import Handler, ModelServer

from deepen_ext.errors import DeepenError, InputError, MemberLost
from deepen_ext.members.backend import Session
from deepen_ext.members.http import client
from deepen_ext.members.http.address import read_address
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

LIMIT = 1.0  # seconds of a request


@pytest.fixture(scope="module")
def server(tiny_smollm2: Member) -> Iterator[ModelServer]:
    with ModelServer(tiny_smollm2, "llama.cpp") as found:
        yield found


@pytest.fixture(scope="module")
def served(server: ModelServer, tiny_smollm2_dir: Path) -> Iterator[Member]:
    member = load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=LIMIT)
    yield member
    member.backend.close()


@pytest.fixture
def session(server: ModelServer, served: Member) -> Iterator[Session]:
    session = served.backend.open(2)
    yield session
    session.close()
    server.fault = server.change = None


def cut_off(handler: Handler) -> bool:
    """A reset before anything is answered."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    return True


def half(handler: Handler) -> bool:
    """The beginning of a body, and then nothing."""
    handler.answer(200, b'[{"index": 0, "completion_prob', Content_Length="5000")
    handler.close_connection = True
    return True


def status(code: int, text: str = "out of luck", **headers: str) -> Callable[[Handler], bool]:
    def answer(handler: Handler) -> bool:
        handler.answer(code, {"error": {"message": text}}, **headers)
        return True

    return answer


def body(text: bytes) -> Callable[[Handler], bool]:
    def answer(handler: Handler) -> bool:
        handler.answer(200, text)
        return True

    return answer


def silent(handler: Handler) -> bool:
    time.sleep(LIMIT + 0.5)
    handler.close_connection = True
    return True


def drop_by_drop(handler: Handler) -> bool:
    """A byte of the header every now and then: no single read takes long."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
        try:
            handler.wfile.write(bytes([byte]))
        except OSError:
            break
        time.sleep(0.05)
    handler.close_connection = True
    return True


def rows(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Any], Any]:
    """Answers whose top tokens are changed in place."""

    def changed(answer: Any) -> Any:
        for part in answer if isinstance(answer, list) else [answer]:
            change(part["completion_probabilities"][0]["top_logprobs"])
        return answer

    return changed


FAULTS = {
    "reset": (cut_off, r"gives no answer.*start it again"),
    "silent": (silent, rf"not answered within {LIMIT:g} seconds.*timeout="),
    "drop by drop": (drop_by_drop, rf"not answered within {LIMIT:g} seconds"),
    "429": (status(429), r"refuses.*HTTP 429: out of luck"),
    "429, later than the limit": (status(429, Retry_After="50"), r"puts requests off \(HTTP 429\)"),
    "429, not a number": (status(429, Retry_After="nan"), r"refuses.*HTTP 429: out of luck"),
    "503, later than the limit": (status(503, Retry_After="50"), r"puts requests off \(HTTP 503\)"),
    "500": (status(500), r"refuses.*HTTP 500: out of luck.*log"),
    "503": (status(503), r"puts requests off \(HTTP 503\)"),
    "half an answer": (half, r"broke off in the middle of an answer, after \d+ bytes"),
    "no JSON": (body(b"<html>hello"), r"no JSON.*check that its address"),
    "no object": (body(b"[]"), r"answers otherwise than llama.cpp"),
    "another shape": (body(b'{"completion_probabilities": 3}'), r"answers otherwise than llama.cpp"),
}
ROWS = {
    "NaN": (lambda top: top[1].update(logprob=float("nan")), "log-probability that is NaN"),
    "no number": (lambda top: top[1].update(logprob=None), "no numbers|NaN"),
    "positive": (lambda top: top[0].update(logprob=0.5), r"log-probability 0\.5, above 0"),
    "more than 1 together": (
        lambda top: [one.update(logprob=-0.1) for one in top],
        "probabilities that sum to",
    ),
    "fewer": (lambda top: top.pop(), "gave 4 tokens with 4 log-probabilities of 5 asked for"),
    "outside": (lambda top: top[2].update(id=10**6), "token id 1000000, outside the vocabulary"),
    "negative": (lambda top: top[2].update(id=-1), "token id -1, outside the vocabulary"),
    "twice": (lambda top: top[2].update(id=top[1]["id"]), "a token twice"),
}


@contextmanager
def lost(member: Member, why: str) -> Iterator[None]:
    """Within the time limit, an error that names the member."""
    began = time.monotonic()
    with pytest.raises(MemberLost, match=why) as caught:
        yield
    assert time.monotonic() - began < LIMIT + 20  # "drop by drop" would go on for minutes
    assert caught.value.member == member.name
    assert str(caught.value).startswith(f"{member.name}: the server http://127.0.0.1:")


@pytest.mark.parametrize("kind", FAULTS)
def test_no_answer(server: ModelServer, served: Member, session: Session, kind: str) -> None:
    """Of one lane of two, and of a text that is read through; afterwards the session goes on."""
    server.fault, why = FAULTS[kind]
    with lost(served, why):
        session.ask({0: [5, 6, 7], 1: [8, 9]}, 5, {0: 3, 1: 1}).wait()
    if kind not in ("silent", "drop by drop"):
        with lost(served, why):
            list(session.read(0, [5, 6, 7, 8], 1, 5))
    server.fault = None
    assert len(session.ask({0: [5, 6, 7], 1: [8, 9]}, 5).wait()) == 2


@pytest.mark.parametrize("kind", ROWS)
def test_an_answer_that_cannot_be_used(
    server: ModelServer, served: Member, session: Session, kind: str
) -> None:
    change, why = ROWS[kind]
    server.change = rows(change)
    with lost(served, why):
        session.ask({0: [5, 6, 7], 1: [8, 9]}, 5, {0: 3, 1: 1}).wait()
    server.change = None
    assert len(session.ask({0: [5, 6, 7], 1: [8, 9]}, 5).wait()) == 2


@pytest.mark.parametrize(
    "fault",
    [
        cut_off,
        status(502),
        status(503),
        status(503, Retry_After="nan"),
        status(503, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
        status(429, Retry_After="0"),
    ],
)
def test_what_is_safe_is_asked_again(
    server: ModelServer, session: Session, fault: Callable[[Handler], bool]
) -> None:
    wanted = session.ask({0: [5, 6, 7]}, 5).wait().topk.ids.tolist()
    left = 2

    def twice(handler: Handler) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fault(handler)

    server.fault = twice
    assert session.ask({0: [5, 6, 7, 8]}, 5).wait().topk.ids.shape == (1, 5)
    assert left == -1
    assert session.ask({0: [5, 6, 7]}, 5).wait().topk.ids.tolist() == wanted


def test_retry_after_is_waited_for(server: ModelServer, session: Session) -> None:
    """With 503 too, as a server says it that starts again or has no memory left."""
    pauses = []
    wait = session._backend.client._closed.wait  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session._backend.client._closed, "wait", lambda s: pauses.append(s) or wait(0))  # type: ignore[attr-defined, func-returns-value]
        server.fault = lambda handler: not pauses and status(503, Retry_After="0.5")(handler)
        session.ask({0: [5, 6, 7, 9]}, 5).wait()
    assert pauses == [0.5]


def test_nothing_may_compress_an_answer(server: ModelServer, session: Session) -> None:
    """Which a proxy may where the request does not say."""
    session.ask({0: [5, 6, 10]}, 5).wait()
    assert server.headers["accept-encoding"] == "identity"


def test_in_the_middle_of_a_text(server: ModelServer, served: Member, session: Session) -> None:
    ids = [5, 6]
    for _ in range(4):
        ids.append(int(session.ask({0: ids}, 5).wait().topk.ids[0, 0]))
    server.fault = status(500)
    with lost(served, "HTTP 500"):
        session.ask({0: ids}, 5).wait()


def test_started_again(tiny_smollm2: Member, tiny_smollm2_dir: Path) -> None:
    """The same model goes on; another model under the same address is refused, by its name or its size."""
    server = ModelServer(tiny_smollm2, "sglang")
    member = load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=LIMIT)
    session = member.backend.open(1)
    try:
        for ids in ([5, 6], [5, 6, 7]):
            session.ask({0: ids}, 5).wait()
        server.stop()
        with lost(member, "gives no answer.*refused"):
            session.ask({0: [5, 6, 7, 8]}, 5).wait()
        server = ModelServer(tiny_smollm2, "sglang", port=server.port)
        session.ask({0: [5, 6, 7, 8]}, 5).wait()
        server.stop()
        server = ModelServer(tiny_smollm2, "sglang", name="org/another", port=server.port)
        with lost(member, "another model .org/another in the place of org/tiny-model"):
            session.ask({0: [5, 6, 7, 8, 9]}, 5).wait()
    finally:
        member.backend.close()
        server.stop()


def test_bos_added_by_the_server(server: ModelServer, served: Member, session: Session) -> None:
    def one_more(answer: Any) -> Any:
        answer["tokens_evaluated"] += 1
        return answer

    server.change = one_more
    with lost(served, "counts 4 ids where 3 were sent: it adds BOS"):
        session.ask({0: [5, 6, 7]}, 5).wait()


def test_closed(server: ModelServer, tiny_smollm2_dir: Path) -> None:
    member = load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=LIMIT)
    session = member.backend.open(1)
    session.ask({0: [5, 6]}, 5).wait()
    member.backend.close()
    member.backend.close()
    with pytest.raises(MemberLost, match=f"^{member.name}: .*closed"):
        session.ask({0: [5, 6, 7]}, 5).wait()


def test_slots_that_come_back_while_others_are_taken(served: Member) -> None:
    """The garbage collector ends a dropped session in whatever the thread is doing, `take_slots` too."""
    backend: Any = served.backend
    every = list(backend._free_slots)
    assert len(every) > 1
    dropped = backend.open(1)

    class Collected(list[int]):
        """Free slots; while their number is looked at, the session is collected."""

        def __len__(self) -> int:
            dropped.close()
            return super().__len__()

    backend._free_slots = Collected(backend._free_slots)
    taken: list[int] = []
    thread = threading.Thread(target=lambda: taken.extend(backend.take_slots(1)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    for slot in taken:
        backend.give_slot(slot)
    backend._free_slots = list(backend._free_slots)
    assert backend._free_slots == every


@pytest.mark.slow
def test_a_thousand_faults_leave_nothing_behind(
    server: ModelServer, served: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sockets, no threads, no slots: most of the requests fail, each kind of failure among them."""
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.001)
    quick = [FAULTS[kind][0] for kind in FAULTS if kind not in ("silent", "drop by drop")]
    rng = random.Random(0)
    failed, seen = 0, set()

    def fault(handler: Handler) -> bool:
        nonlocal failed
        if rng.random() < 0.4:
            return False
        failed += 1
        chosen = rng.choice(quick)
        seen.add(chosen)
        return chosen(handler)

    def settled() -> tuple[int, int]:
        gc.collect()
        time.sleep(0.3)
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    slots = list(served.backend._free_slots)  # type: ignore[attr-defined]
    for lanes in (4, 4):  # all connections and threads that there may be
        with_all = served.backend.open(lanes)
        with_all.ask({lane: [5, 6, lane] for lane in range(lanes)}, 5).wait()
        with_all.close()
    before = settled()
    server.fault = fault
    errors = 0
    try:
        while failed < 1000:
            session = served.backend.open(4)
            try:
                session.ask({lane: [5, 6, rng.randrange(100)] for lane in range(4)}, 5).wait()
            except MemberLost:
                errors += 1
            finally:
                session.close()
    finally:
        server.fault = None
    assert errors > 50
    assert len(seen) == len(quick)
    after = settled()
    # Each kept connection is two sockets and a thread of the server's, all in this process.
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
    assert served.backend._free_slots == slots  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("http://localhost:1", {"threads": 2}, "the server chooses its threads; leave threads out"),
        ("http://localhost:1", {"dtype": "float16"}, "dtype='float16' is no option of the backend http"),
        ("http://localhost:1", {"backend": "transformers"}, "the model is in a server, not in transformers"),
        ("demo:gemma-3-270m", {"backend": "http"}, "the backend http is for servers"),
        ("demo:gemma-3-270m", {"tokenizer": "org/name"}, "tokenizer is for members that a server runs"),
        ("http://localhost:1", {"api_key": "env:NOT_THERE"}, "the environment has no NOT_THERE"),
        ("http://localhost:1", {"api_key": "file:/not/there"}, "the file cannot be read"),
        ("http://me:secret@localhost:1", {}, r"http://...@localhost: .*api_key=env:NAME"),
        ("http://localhost:1/?model=a", {}, "no address of a server; write http://host:port"),
        ("http://localhost:port", {}, "no address of a server"),
        ("http://localhost:0", {}, "no address of a server"),
        ("http://", {}, "no address of a server"),
    ],
)
def test_what_does_not_go_with_a_server(name: str, options: dict[str, Any], message: str) -> None:
    """Before anything is asked."""
    with pytest.raises(InputError, match=message) as raised:
        load_member(name, **options)
    assert "secret" not in str(raised.value)


def test_a_path_is_sent_as_addresses_have_it() -> None:
    """A space or an umlaut in a request's first line is no HTTP."""
    assert read_address("http://[::1]:80/my models/Bär/v1").path == "/my%20models/B%C3%A4r"
    assert read_address("http://x/members/a%232").path == "/members/a%232"


class TestKeys:
    KEY = "sk-very-secret"

    def test_it_is_sent_and_never_shown(
        self,
        server: ModelServer,
        tiny_smollm2_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setenv("OUR_KEY", self.KEY)
        (tmp_path / "key").write_text(f"{self.KEY}\n")
        for where in ("env:OUR_KEY", f"file:{tmp_path / 'key'}"):
            server.headers = {}
            member = load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=LIMIT, api_key=where)
            assert server.headers["authorization"] == f"Bearer {self.KEY}"
            shown = [repr(member.backend), repr(vars(member.backend)), repr(member.backend.describe())]
            server.fault = status(401, f"no such key: {self.KEY}")
            with pytest.raises(MemberLost, match=r"HTTP 401: no such key: \*\*\*") as caught:
                member.backend.open(1).ask({0: [5, 6, 7]}, 5).wait()
            server.fault = None
            assert self.KEY not in json.dumps([*shown, str(caught.value)])
            member.backend.close()

    def test_a_key_in_the_place_of_its_place(self, server: ModelServer, tiny_smollm2_dir: Path) -> None:
        with pytest.raises(DeepenError, match="env:NAME or file:PATH") as caught:
            load_member(server.url, tokenizer=tiny_smollm2_dir, api_key=self.KEY)
        assert self.KEY not in str(caught.value)

    def test_a_server_that_wants_one(self, server: ModelServer, tiny_smollm2_dir: Path) -> None:
        server.fault = status(401, "no key")
        try:
            with pytest.raises(MemberLost, match=r"refuses requests .HTTP 401: no key.*api_key="):
                load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=LIMIT)
        finally:
            server.fault = None
