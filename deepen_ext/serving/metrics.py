"""What Prometheus is told, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepen_ext.serving.engine import Load
from deepen_ext.serving.requests import Ended

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_PATHS = (
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/tokenize",
    "/detokenize",
    "/version",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
)


class Metrics:
    """Counts and times. Labels are names of models and paths that there are, never what a client sent."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, load: Callable[[], Load]) -> None:
        """load: what the engine is doing, asked for at every scrape."""
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(load))
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._responses = counter("deepen_ext_http_responses", "Answers.", ("path", "status"))
        self._texts = counter("deepen_ext_texts", "Texts that ended.", ("model", "finish_reason"))
        self._prompt = counter("deepen_ext_model_prompt_tokens", "Tokens of prompts.", ("model",))
        self._new = counter("deepen_ext_model_tokens", "Tokens written, of texts that ended.", ("model",))
        self._changed = counter(
            "deepen_ext_model_changed_tokens", "Of these, those that the assistants changed.", ("model",)
        )
        self._first = histogram(
            "deepen_ext_first_token_seconds", "From request to first token.", ("model",), buckets=_SECONDS
        )
        self._between = histogram(
            "deepen_ext_between_tokens_seconds",
            "From one token of a text to its next.",
            ("model",),
            buckets=_BETWEEN,
        )
        self._whole = histogram(
            "deepen_ext_request_seconds", "From request to last token.", ("model",), buckets=_SECONDS
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def answered(self, path: str, status: int) -> None:
        """A request was answered."""
        known = path if path in _PATHS else "/members" if path.startswith("/members/") else "other"
        self._responses.labels(known, status).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """A text has its first token."""
        self._first.labels(model).observe(seconds)

    def next_token(self, model: str, seconds: float) -> None:
        """A text has another one."""
        self._between.labels(model).observe(seconds)

    def ended(self, model: str, text: Ended) -> None:
        """A text has ended."""
        self._texts.labels(model, text.finish_reason).inc()
        self._prompt.labels(model).inc(text.prompt_tokens)
        self._new.labels(model).inc(text.completion_tokens)
        self._changed.labels(model).inc(text.changed_tokens)

    def unfinished(self, model: str, texts: int, reason: str) -> None:
        """A request is over, and these texts of it have no end."""
        if texts:
            self._texts.labels(model, reason).inc(texts)

    def whole(self, model: str, seconds: float) -> None:
        """A request has all of its texts."""
        self._whole.labels(model).observe(seconds)


class _OfEngine(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        now = self._load()
        gauges = {
            "running": (now.running, "Texts that are being written."),
            "reading": (now.reading, "Texts whose prompt is being read."),
            "waiting": (now.waiting, "Texts in the queue."),
            "cache_bytes": (now.bytes_held, "Bytes of the caches."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"deepen_ext_{name}", text, value=value)
        yield CounterMetricFamily("deepen_ext_tokens", "Tokens written.", value=now.tokens)
        yield CounterMetricFamily(
            "deepen_ext_prompt_tokens", "Tokens of prompts read.", value=now.prompt_tokens
        )


class Counting:
    """Middleware: every answer's path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, or something else that is not counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.answered(scope["path"], message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            if not begun:  # the framework answers it, outside of all middleware
                self._metrics.answered(scope["path"], 500)
            raise
