"""A server of the tests' own that streams real records as `deepen-ext serve` does, and fails as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deepen_ext.serving.page import page_html


@dataclass
class StandIn:
    """What is served.

    Attributes:
        texts: the records of each model's text.
        pause: seconds between two tokens.
        key: what a client has to send; "" for nothing.
        fault: called with the handler before an answer; true: it has answered.
        after: called with the handler and the number of tokens sent, before each token; true: end here.
        requests: paths and bodies of what was asked for.
        paths: of every request.
    """

    texts: dict[str, Sequence[dict[str, Any]]]
    pause: float = 0.0
    key: str = ""
    fault: Callable[[Handler], bool] | None = None
    after: Callable[[Handler, int], bool] | None = None
    requests: list[tuple[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def __enter__(self) -> StandIn:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.stand_in = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stand_in(self) -> StandIn:
        return self.server.stand_in  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> bool:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def error(self, status: int, message: str, **headers: str) -> bool:
        return self.answer(status, json.dumps({"error": {"message": message}}).encode(), **headers)

    def _refused(self) -> bool:
        key = self.stand_in.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            return self.error(401, "the key is wrong or missing")
        return False

    def do_GET(self) -> None:
        self.stand_in.paths.append(self.path)
        if self.path == "/":
            self.answer(200, page_html().encode(), "text/html; charset=utf-8")
        elif self.path == "/v1/models" and not self._refused():
            data = [self._card(name, records) for name, records in self.stand_in.texts.items()]
            self.answer(200, json.dumps({"object": "list", "data": data}).encode())
        elif self.path != "/v1/models":
            self.error(404, "no such path")

    @staticmethod
    def _card(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        members = list({one["name"]: None for record in records for one in record["members"]})
        kind = "ensemble" if len(members) > 1 else "member"
        return {"id": name, "object": "model", "deepen": {"kind": kind, "members": members}}

    def do_POST(self) -> None:
        self.stand_in.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.requests.append((self.path, body))
        if self._refused() or (self.stand_in.fault is not None and self.stand_in.fault(self)):
            return
        try:
            self._stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        chat = self.path == "/v1/chat/completions"
        records = list(self.stand_in.texts[body["model"]])[: body["max_tokens"]]
        for sent, record in enumerate(records):
            if self.stand_in.after is not None and self.stand_in.after(self, sent):
                return
            piece = {"delta": {"content": record["text"]}} if chat else {"text": record["text"]}
            self.send({"choices": [{"index": 0, "finish_reason": None, **piece}], "deepen": record})
            if self.stand_in.pause:
                time.sleep(self.stand_in.pause)
        ending = {"delta": {}} if chat else {"text": ""}
        self.send({"choices": [{"index": 0, "finish_reason": "length", **ending}]})
        self.send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(records)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()
