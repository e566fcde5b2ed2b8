"""Connections whose every wait ends at one moment, the deadline of the request.

httpcore limits each read by itself: a server that sends a byte now and then would hold a request for ever.
Here a thread sets its deadline, and what it still may wait is what is left until then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore


class Wire(httpcore.NetworkBackend):
    """httpcore's own connections, with a deadline.

    Attributes:
        opened: how many connections were made so far.
    """

    def __init__(self) -> None:
        """Nothing is connected."""
        self.opened = 0
        self._inner = httpcore.SyncBackend()
        self._local = threading.local()
        self._lock = threading.Lock()

    def set_deadline(self, deadline: float) -> None:
        """Of all that this thread does from now on, by `time.monotonic`."""
        self._local.deadline = deadline

    def left(self) -> float:
        """Seconds until this thread's deadline.

        Raises:
            httpcore.ReadTimeout: it has passed.
        """
        seconds = float(self._local.deadline) - time.monotonic()
        if seconds <= 0:
            raise httpcore.ReadTimeout("the time limit has passed")
        return seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """See httpcore, which also sets TCP_NODELAY."""
        found = self._inner.connect_tcp(host, port, self.left(), local_address, socket_options)
        with self._lock:
            self.opened += 1
        return _Stream(found, self)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, wire: Wire) -> None:
        self._inner = inner
        self._wire = wire

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._wire.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._wire.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, self._wire.left()), self._wire)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
