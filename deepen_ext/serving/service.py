"""What the routes share: the engine, the models, and how one request goes through both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import anyio
from starlette.responses import Response

from deepen_ext.members.chat import WithoutTemplate
from deepen_ext.serving import asking
from deepen_ext.serving.answers import Answer, Streaming
from deepen_ext.serving.bodies import ChatBody, CompletionBody
from deepen_ext.serving.engine import Engine
from deepen_ext.serving.errors import LOG, refused, shutting_down
from deepen_ext.serving.listening import Texts, most_waiting
from deepen_ext.serving.metrics import Metrics
from deepen_ext.serving.models import Models
from deepen_ext.serving.shapes import ChatShape, CompletionShape, Shape

_Found = TypeVar("_Found")
# Prompts are tokenised in threads; more of them would keep the engine's from the processor.
_THREADS = 2


@dataclass(frozen=True)
class Limits:
    """What clients may do, and what is told of them.

    Attributes:
        key: the API key; None for none.
        body_bytes: the largest body.
        seconds: of one request; None for no limit.
        without_template: in chats, where a request does not say.
        log_prompts: whether prompts go into the log.
    """

    key: str | None = None
    body_bytes: int = 4 << 20
    seconds: float | None = 600.0
    without_template: WithoutTemplate = "plain"
    log_prompts: bool = False


@dataclass
class Service:
    """One server's engine and models.

    Attributes:
        closing: no new requests.
    """

    engine: Engine
    models: Models
    limits: Limits = field(default_factory=Limits)
    closing: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.engine.load)
        self._threads: anyio.CapacityLimiter | None = None

    async def completion(self, models: Models, body: CompletionBody) -> Response:
        """Answer a completion."""
        began = perf_counter()
        model = models.named(body.model)
        asked = await self._in_thread(lambda: asking.completion(model, body))
        shape = CompletionShape(asked, explain=body.explain, as_ids=body.return_tokens_as_token_ids)
        return await self._answer(shape, body, began)

    async def chat(self, models: Models, body: ChatBody) -> Response:
        """Answer a chat."""
        began = perf_counter()
        model = models.named(body.model)
        asked = await self._in_thread(lambda: asking.chat(model, body, self.limits.without_template))
        return await self._answer(ChatShape(asked, explain=body.explain), body, began)

    async def _answer(self, shape: Shape, body: CompletionBody | ChatBody, began: float) -> Answer:
        if self.closing:
            raise shutting_down()
        if body.stream_options is not None and not body.stream:
            raise refused("stream_options is for streams; set stream, or leave it out", "stream_options")
        if self.limits.log_prompts:
            LOG.info("%s prompts: %r", shape.id, [one.prompt for one in shape.asked.requests[:: body.n]])
        requests = shape.asked.requests
        if len(requests) > self.engine.most_waiting:
            raise refused(
                f"the request has {len(requests)} texts (prompts times n), and this server lets "
                f"{self.engine.most_waiting} wait; send fewer at once, or start it with a larger --queue"
            )
        texts = Texts(len(requests), most_waiting(requests))
        try:
            await self._in_thread(lambda: texts.submit(self.engine, requests))
        except BaseException:
            texts.give_up()
            raise
        streaming = None
        if body.stream:
            streaming = Streaming(body.stream_options is not None and body.stream_options.include_usage)
        return Answer(
            shape, texts, self.metrics, began=began, seconds=self.limits.seconds, streaming=streaming
        )

    async def _in_thread(self, call: Callable[[], _Found]) -> _Found:
        if self._threads is None:  # it belongs to the event loop
            self._threads = anyio.CapacityLimiter(_THREADS)
        return await anyio.to_thread.run_sync(call, limiter=self._threads)
