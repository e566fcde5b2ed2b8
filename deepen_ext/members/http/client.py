"""Requests to one server: connections that are kept, a time limit, and repeats of what is safe to repeat.

Every request is a question without effects, so that asking again changes nothing. Asked again is what found
no server, was cut off before an answer began, or was put off by the server (429 with Retry-After, 502, 503):
a few times, not sooner than Retry-After says, and never past the request's time limit.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpcore

from deepen_ext.errors import MemberLost
from deepen_ext.members.http.address import Address
from deepen_ext.members.http.wire import Wire

_REPEATS = 3
_FIRST_PAUSE = 0.1  # seconds; twice as long each time
_MOST_BYTES = 1 << 28  # of an answer
_UNANSWERED = (
    httpcore.ConnectError,
    httpcore.ReadError,
    httpcore.WriteError,
    httpcore.RemoteProtocolError,
    httpcore.ConnectionNotAvailable,
)


class Refusal(Exception):
    """The server answered, and refused: an HTTP status that is no success.

    Attributes:
        status: of the answer.
        text: what the server said.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}" if text else f"HTTP {status}")
        self.status = status
        self.text = text


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class Client:
    """One server. Threads may share it.

    Attributes:
        address: where the server is.
        member: the member's name, for errors.
    """

    def __init__(self, address: Address, key: str | None, timeout: float, connections: int) -> None:
        """Nothing is connected yet.

        Args:
            address: where the server is.
            key: sent with every request as a bearer's token; None where the server wants none.
            timeout: seconds that a request may take, its repeats included.
            connections: the most that are open at once; no more requests than that are made at once.
        """
        self.address = address
        self.member = str(address)
        self._key = key
        self._timeout = timeout
        self._wire = Wire()
        self._pool = httpcore.ConnectionPool(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=60.0,
            network_backend=self._wire,
        )
        self._closed = threading.Event()

    @property
    def connections_made(self) -> int:
        """How many connections were made so far: a restarted server is on a new one."""
        return self._wire.opened

    def get(self, path: str) -> Any:
        """The JSON at a path; see `post`."""
        return self._call("GET", path, None)

    def post(self, path: str, payload: Mapping[str, Any]) -> Any:
        """Send JSON, and give the JSON of the answer.

        Raises:
            Refusal: the server refused; not where it put the request off too long (429, 502, 503).
            MemberLost: no whole answer within the time limit, or one that is no JSON.
        """
        return self._call("POST", path, json.dumps(payload, separators=(",", ":")).encode())

    def lost(self, why: str) -> MemberLost:
        """An error that names the member and its server; the server's key is nowhere in it."""
        return MemberLost(self.member, f"the server {self.address} {self._without_key(why)}")

    def close(self) -> None:
        """Close all connections. A second call does nothing."""
        self._closed.set()
        self._pool.close()

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        reply = self._reply(method, path, body)
        if not 200 <= reply.status < 300:
            raise Refusal(reply.status, self._without_key(_said(reply.body)))
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError):
            raise self.lost(
                f"answered {path} with {len(reply.body)} bytes that are no JSON; check that its address is "
                "the server's own, and its log"
            ) from None

    def _reply(self, method: str, path: str, body: bytes | None) -> _Reply:
        """The first answer that is not to be repeated."""
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        for repeat in range(_REPEATS + 1):
            if self._closed.is_set():
                raise self.lost("is not asked any more: the member was closed")
            wait = pause
            try:
                reply = self._once(method, path, body, deadline)
            except _UNANSWERED as error:
                why = f"gives no answer ({_words(error)}); start it again, or check its address"
            else:
                later = _put_off(reply)
                if later is None:
                    return reply
                wait = max(later, pause)
                why = f"puts requests off (HTTP {reply.status}); wait until it is less busy"
            if repeat == _REPEATS or time.monotonic() + wait >= deadline:
                break
            self._closed.wait(wait)
            pause *= 2
        raise self.lost(why)

    def _once(self, method: str, path: str, body: bytes | None, deadline: float) -> _Reply:
        """One try. An error of `_UNANSWERED`: the answer did not begin."""
        self._wire.set_deadline(deadline)
        address = self.address
        headers = [
            (b"host", address.host_and_port.encode()),
            (b"accept", b"application/json"),
            (b"accept-encoding", b"identity"),  # without it a proxy may compress
        ]
        if self._key is not None:
            headers.append((b"authorization", b"Bearer " + self._key.encode()))
        if body is not None:
            headers.append((b"content-type", b"application/json"))
            headers.append((b"content-length", str(len(body)).encode()))
        request = httpcore.Request(
            method,
            httpcore.URL(
                scheme=address.scheme.encode(),
                host=address.host.encode("idna"),
                port=address.port,
                target=f"{address.path}{path}".encode(),
            ),
            headers=headers,
            content=body,
            extensions={"timeout": {"pool": max(deadline - time.monotonic(), 0.001)}},
        )
        try:
            response = self._pool.handle_request(request)
            try:
                return _Reply(response.status, _lower(response.headers), self._body(response))
            finally:
                response.close()
        except httpcore.TimeoutException:
            raise self.lost(
                f"has not answered within {self._timeout:g} seconds; see what it is doing, or give a longer "
                "timeout="
            ) from None

    def _body(self, response: httpcore.Response) -> bytes:
        parts, size = [], 0
        try:
            for part in response.iter_stream():
                parts.append(part)
                size += len(part)
                if size > _MOST_BYTES:
                    raise self.lost("sends an answer without end; check that its address is the server's own")
        except (httpcore.ReadError, httpcore.RemoteProtocolError) as error:
            raise self.lost(
                f"broke off in the middle of an answer, after {size} bytes ({_words(error)}); see its log, "
                "and start it again"
            ) from None
        return b"".join(parts)

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")


def _lower(headers: Any) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in headers}


def _put_off(reply: _Reply) -> float | None:
    """Seconds after which to ask again; None where the answer is not put off."""
    if reply.status not in (429, 502, 503):
        return None
    try:
        later = float(reply.headers[b"retry-after"])
    except (KeyError, ValueError):  # none, or a date
        later = math.nan
    if later >= 0:
        return later
    return None if reply.status == 429 else 0.0


def _said(body: bytes) -> str:
    """What a server says of why it refuses, in one line."""
    try:
        said = json.loads(body)
        while isinstance(said, dict):
            said = next((said[key] for key in ("error", "message", "detail") if key in said), "")
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, RecursionError):
        text = body[:300].decode(errors="replace")
    return " ".join(text.split())[:300]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
