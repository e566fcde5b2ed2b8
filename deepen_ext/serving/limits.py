"""What is looked at before a request is read: its key, its size, how long it takes to come."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepen_ext.serving.errors import ApiError, shutting_down

# Seconds for a body to come.
BODY_SECONDS = 30.0
# They tell nothing of models, prompts or texts: a probe and a browser's first look need no key.
_OPEN = ("/", "/health", "/favicon.ico")


class Gate:
    """Middleware: refuses requests without the key, those that come too slowly and those that are too large.

    A body is counted as it comes, so that one without a length, or with a wrong one, is cut off as well.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        most_bytes: int,
        closing: Callable[[], bool],
    ) -> None:
        """Before an app.

        Args:
            app: what is behind.
            key: what clients send as ``Authorization: Bearer KEY``; None for no key.
            most_bytes: of a body.
            closing: whether the server takes no new requests any more.
        """
        self._app = app
        self._key = None if key is None else key.encode()
        self._most = most_bytes
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, or something else that is not looked at."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check(scope["path"], scope["method"], headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        body = _Body(receive, self._most)
        await self._app(scope, body.receive, send)

    def _check(self, path: str, method: str, headers: dict[bytes, bytes]) -> None:
        if not self._allowed(path, headers.get(b"authorization", b"")):
            raise ApiError(
                401, "a wrong API key, or none; send Authorization: Bearer KEY", code="invalid_api_key"
            )
        if method == "POST" and self._closing():
            raise shutting_down()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise too_large(self._most)

    def _allowed(self, path: str, sent: bytes) -> bool:
        if self._key is None or path in _OPEN:
            return True
        kind, _, key = sent.partition(b" ")
        # In constant time: how long it takes tells nothing of the key.
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"


def too_large(most: int) -> ApiError:
    """A body of more than so many bytes."""
    return ApiError(413, f"the body is larger than {most:,} bytes, which is the server's limit")


class _Body:
    """What comes of one request."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._size = 0
        self._whole = False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the end of the connection
            return await self._receive()
        left = self._until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._most:
                raise too_large(self._most)
        return message
