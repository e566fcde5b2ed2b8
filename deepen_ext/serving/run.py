"""uvicorn around the application: half requests end, and so does the server, in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepen_ext.errors import InputError
from deepen_ext.serving.app import make_app
from deepen_ext.serving.service import Service

# Seconds for a request's headers to come, and for the rest of a body that was refused.
_PATIENCE = 20.0
# Seconds that a connection without a request is kept; clients of ours keep theirs for 60.
_KEEP = 75
_AFTER_GRACE = 2.0  # for what was cancelled to say so
_LOOK = 0.2  # how often a server that is ending looks for a second signal


class PatientProtocol(H11Protocol):
    """uvicorn's own, which would wait for ever for the rest of a request."""

    patience = _PATIENCE
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; a request has to follow."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.patience, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """The answer was sent; a part of the next request may be here."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._clear()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """No word: Java's client asks every plain server for HTTP/2 in this way, and takes HTTP/1.1."""

    def _look(self) -> None:
        state = self.conn.their_state
        half_head = state is h11.IDLE and bool(self.conn.trailing_data[0])
        refused_body = state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not half_head and not refused_body:
            self._clear()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.patience, self._too_slow)

    def _clear(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
        self.transport.close()


def reserve(host: str, port: int) -> socket.socket:
    """A socket with this address, before minutes of loading. Clients are refused until it listens.

    Raises:
        InputError: the address is taken, not this machine's, or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}; give this machine's name") from None
    with _refusals(found, host, port):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that takes nothing for so long has gone
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000)
        found.bind(address)
    return found


@contextmanager
def _refusals(found: socket.socket, host: str, port: int) -> Iterator[None]:
    """What the system says against the address, as an InputError; the socket is closed then."""
    try:
        yield
    except OSError as error:
        found.close()
        raise InputError(
            f"{host}:{port}: {error.strerror}; choose another --port or --host, or end what listens there"
        ) from None


class WebServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then what is being written may go on for `grace` seconds.

    Attributes:
        interrupted: whether it was SIGINT.
    """

    interrupted = False

    def __init__(self, service: Service, *, host: str, port: int, grace: float) -> None:
        """Nothing listens yet; port 0 for any free one."""
        self.service = service
        self.grace = grace
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=host,
                port=port,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP,
                timeout_graceful_shutdown=max(1, round(grace + 2 * _AFTER_GRACE)),
            )
        )

    def bind(self, reserved: socket.socket | None = None) -> socket.socket:
        """A socket that listens where this server shall.

        Args:
            reserved: what `reserve` gave for the same address.

        Raises:
            InputError: the address is taken, not this machine's, or not allowed.
        """
        host, port = str(self.config.host), self.config.port
        found = reserve(host, port) if reserved is None else reserved
        with _refusals(found, host, port):
            found.listen(self.config.backlog)
        return found

    def address(self, listening: socket.socket) -> str:
        """Where clients find it."""
        host = str(self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; see uvicorn."""
        self.service.closing = True
        ending = threading.Thread(target=self.service.engine.close, args=(self.grace,), daemon=True)
        ending.start()
        leaving = asyncio.ensure_future(super().shutdown(sockets))
        # Since Python 3.12 it waits for open connections after a second signal too; they are cancelled by the
        # loop's end, which tells their clients.
        while not leaving.done():
            await asyncio.wait({leaving}, timeout=_LOOK)
            if self.force_exit:
                return
        leaving.result()
        if not self.force_exit:
            await asyncio.get_running_loop().run_in_executor(None, ending.join, _AFTER_GRACE)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM ends the server well: exit code 0. uvicorn would raise the signal once more at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal ends it with grace, the second at once."""
        self.interrupted = sig == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True
