"""An answer on its way to a client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deepen_ext.serving.errors import LOG, ApiError, from_deepen, shutting_down
from deepen_ext.serving.listening import Texts, Told, TooSlow
from deepen_ext.serving.metrics import Metrics
from deepen_ext.serving.requests import Ended, Failed, Piece, Prompted
from deepen_ext.serving.shapes import Shape
from deepen_ext.serving.writing import Part, Writing

_LAST_WORDS = 1.0  # seconds for telling a client of an error in the middle of a stream
# Many clients (httpx, Python's `splitlines`) end lines at these too, as server-sent events do not. The others
# of that kind JSON escapes by itself.
_ENDS_OF_LINES = {ord(one): f"\\u{ord(one):04x}" for one in "\x85\u2028\u2029"}
# Why texts of a request have no end, as metrics have it; whatever else ends one counts as cancelled.
_REASONS = {"failed": "failed", "out of time": "timeout"}


@dataclass(frozen=True)
class Streaming:
    """What a stream has beside the text."""

    usage: bool = False


class Answer(Response):
    """The texts of one request, sent as they come or when they are there.

    Whatever ends it, be it that the client goes away, the texts that are not done are cancelled.
    """

    def __init__(
        self,
        shape: Shape,
        texts: Texts,
        metrics: Metrics,
        *,
        began: float,
        seconds: float | None,
        streaming: Streaming | None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            shape: of the answer.
            texts: what comes.
            metrics: to be told of it.
            began: when the request came, by `perf_counter`.
            seconds: how long all of it may take from then on; None for ever.
            streaming: None for an answer that comes whole.
        """
        super().__init__()
        asked = shape.asked
        self._shape = shape
        self._texts = texts
        self._metrics = metrics
        self._model = asked.model.name
        self._began = began
        self._seconds = seconds
        self._streaming = streaming
        self._writings = [Writing(asked.stops, asked.write) for _ in asked.requests]
        self._last: list[float | None] = [None] * len(asked.requests)
        self._failed: ApiError | None = None
        self._sent_head = False
        self._tokens = 0  # that came, of all texts
        self._counted = 0  # texts whose end was counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        left = None if self._seconds is None else self._began + self._seconds - perf_counter()
        how = "cut off"
        try:
            await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                how = "failed" if work.exception() or self._failed else "done"
                work.result()
            elif gone.done():
                how = "the client went away"
            else:
                how = "out of time"
                await _end(work)
                why = f"the answer took longer than {self._seconds:g} seconds"
                await self._cut_off(ApiError(504, why, code="timeout"), send)
        except asyncio.CancelledError:  # uvicorn's, at the server's end: the engine is in a long forward
            await _end(work)
            await self._cut_off(shutting_down(), send)
        finally:
            self._texts.give_up()
            await _end(work)
            await _end(gone)
            self._tell(how)

    async def _cut_off(self, error: ApiError, send: Send) -> None:
        if not self._sent_head:
            raise error
        await self._last_words(error, send)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streaming is None:
            body = await self._collect()
            await JSONResponse(body)(scope, receive, send)
            return
        try:
            await self._stream(send)
        except ApiError as error:
            self._failed = error
            if not self._sent_head:
                raise
            await self._last_words(error, send)

    async def _last_words(self, error: ApiError, send: Send) -> None:
        """Tell the client of an error, if it listens; in a stream that has begun, the status was sent."""
        data = _event(error.body)
        try:
            await asyncio.wait_for(_body(send, data, more=False), _LAST_WORDS)
        except asyncio.TimeoutError:
            return  # uvicorn closes the connection

    async def _collect(self) -> dict[str, Any]:
        parts: list[list[Part]] = [[] for _ in self._writings]
        async for number, event in self._events():
            writing = self._writings[number]
            if isinstance(event, Prompted):
                self._shape.prompted(number, event)
            elif isinstance(event, Ended):
                parts[number].append(writing.end(event))
            else:
                parts[number].append(writing.add(event))
        return self._shape.whole(parts, self._ended)

    async def _stream(self, send: Send) -> None:
        shape, streaming = self._shape, self._streaming
        assert streaming is not None
        begun: set[int] = set()
        while self._going:
            events = await self._next()  # an error before the first token has a status of its own
            chunks: list[dict[str, Any]] = []
            for number, event in _grouped(events, shape.explain):
                if number not in begun:
                    begun.add(number)
                    prompted = event if isinstance(event, Prompted) else None
                    if (first := shape.begin(number, prompted)) is not None:
                        chunks.append(first)
                if isinstance(event, Prompted):
                    continue
                chunks += self._chunks(number, event)
            if chunks:
                await self._send(chunks, send)
        if streaming.usage:
            await self._send([shape.usage_chunk(self._ended)], send)
        await _body(send, b"data: [DONE]\n\n", more=False)

    def _chunks(self, number: int, event: Ended | list[Piece]) -> list[dict[str, Any]]:
        writing, shape = self._writings[number], self._shape
        if isinstance(event, Ended):
            return [shape.chunk(number, writing.end(event))]
        part = writing.add(event)
        wanted = shape.explain or shape.asked.top is not None
        return [shape.chunk(number, part)] if part.text or (wanted and part.pieces) else []

    async def _send(self, chunks: Sequence[dict[str, Any]], send: Send) -> None:
        if self._streaming is not None and self._streaming.usage:
            for one in chunks:
                one.setdefault("usage", None)
        if not self._sent_head:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self._sent_head = True
        await _body(send, b"".join(map(_event, chunks)), more=True)

    async def _events(self) -> Any:
        while self._going:
            for one in _grouped(await self._next(), False):
                yield one

    async def _next(self) -> list[Told]:
        """What has come, counted; up to where a text failed.

        Raises:
            ApiError: a text failed, or was cancelled, which only the server's end does here.
        """
        if self._failed is not None:
            raise self._failed
        try:
            events = await self._texts.next()
        except TooSlow:
            raise ApiError(
                408, "more waits for this client than may; read faster", code="slow_reader"
            ) from None
        for i, (number, event, at) in enumerate(events):
            if isinstance(event, Piece):
                self._tokens += 1
                before, self._last[number] = self._last[number], at
                if before is None:
                    self._metrics.first_token(self._model, at - self._began)
                else:
                    self._metrics.next_token(self._model, at - before)
            elif isinstance(event, Failed):
                self._failed = from_deepen(event.error, self._shape.id)
            elif isinstance(event, Ended):
                self._metrics.ended(self._model, event)
                self._counted += 1
                if event.finish_reason == "cancelled":
                    self._failed = shutting_down()
            if self._failed is not None:
                return events[:i]
        return events

    @property
    def _going(self) -> bool:
        return any(one.ended is None for one in self._writings)

    @property
    def _ended(self) -> list[Ended]:
        return [one.ended for one in self._writings if one.ended is not None]

    def _tell(self, how: str) -> None:
        """A line in the log; no prompt and no text."""
        seconds = perf_counter() - self._began
        if how == "done":
            self._metrics.whole(self._model, seconds)
        left = len(self._writings) - self._counted
        self._metrics.unfinished(self._model, left, _REASONS.get(how, "cancelled"))
        LOG.info(
            "%s %s: %s, %d of %d texts, %d tokens, %.2f s",
            self._shape.id,
            self._model,
            how,
            len(self._ended),
            len(self._writings),
            self._tokens,
            seconds,
        )


def _grouped(events: Sequence[Told], singly: bool) -> list[tuple[int, Any]]:
    """Events by text, pieces that follow one another together, or each by itself."""
    found: list[tuple[int, Any]] = []
    open_at: dict[int, list[Piece]] = {}
    for number, event, _ in events:
        if isinstance(event, Piece):
            if number in open_at and not singly:
                open_at[number].append(event)
                continue
            open_at[number] = [event]
            found.append((number, open_at[number]))
        else:
            open_at.pop(number, None)
            found.append((number, event))
    return found


async def _disconnected(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel it and wait; what it raises was seen, or does not matter any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _body(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_ENDS_OF_LINES)
    return b"data: " + text.encode() + b"\n\n"
