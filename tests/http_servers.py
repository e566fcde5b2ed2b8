"""HTTP servers of the tests' own, with a real model behind them.

They answer by the schemas of vLLM 0.33 (``/v1/completions``), SGLang 0.5.23 (``/generate``) and llama.cpp
(``/completion``), as far as a member needs them, and can be made to fail in every way.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from deepen_ext.members.asking import common_prefix
from deepen_ext.members.member import Member

MOST_LOGPROBS = 20  # vLLM's --max-logprobs


class ModelServer:
    """A server in threads of this process.

    Attributes:
        url: its address.
        requests: paths and bodies of what it was asked.
        fault: called with the request's handler before an answer to a POST for distributions is made; true:
            it has answered. None: all is well.
        change: makes another answer of the right one; None: none.
        headers: of the last request.
    """

    def __init__(self, member: Member, kind: str, name: str = "org/tiny-model", port: int = 0) -> None:
        self.member = member
        self.kind = kind
        self.name = name
        self.requests: list[tuple[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.fault: Callable[[Handler], bool] | None = None
        self.change: Callable[[Any], Any] | None = None
        self._session = member.backend.open(1)
        self._read: list[int] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.model = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()
        self._thread.join()

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def rows(self, ids: list[int], positions: int) -> tuple[torch.Tensor, int]:
        """Log-probabilities after the last positions, and how many ids were known already."""
        with self._lock:
            cached = min(common_prefix(self._read, ids), len(ids) - 1)
            logits = self._session.ask({0: ids}, 1, positions).wait().logits
            assert logits is not None
            self._read = list(ids)
            return logits.float().log_softmax(-1), cached

    def encode(self, text: str) -> list[int]:
        return list(self.member.tokenizer.encode(text, add_special_tokens=False))

    def get(self, path: str) -> Any:
        if self.kind == "openai":
            model = {
                "id": self.name,
                "object": "model",
                "owned_by": "vllm",
                "max_model_len": 200,
                "parent": None,
            }
            return {
                "/v1/models": {
                    "object": "list",
                    "data": [model, {**model, "id": "lora", "parent": self.name}],
                },
                "/version": {"version": "0.33.0"},
            }.get(path)
        if self.kind == "sglang":
            return {
                "/model_info": {"model_path": self.name, "model_type": "llama", "tokenizer_path": self.name},
                "/server_info": {"version": "0.5.23", "max_req_input_len": 200, "dtype": "auto"},
            }.get(path)
        meta = {"n_vocab": self.member.vocab_size, "n_ctx_train": 200, "n_params": 1000, "ftype": "all F32"}
        return {
            "/props": {"default_generation_settings": {"n_ctx": 256}, "total_slots": 4},
            "/v1/models": {"data": [{"id": self.name, "meta": meta}]},
        }.get(path)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/tokenize":
            tokens = self.encode(body["content"] if self.kind == "llama.cpp" else body["prompt"])
            return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": 200}
        answer = {"/v1/completions": _vllm, "/generate": _sglang, "/completion": _llama_cpp}[path]
        return answer(self, body)


def _top(row: torch.Tensor, k: int) -> list[tuple[int, float]]:
    values, ids = row.topk(k)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _vllm(server: ModelServer, body: Any) -> tuple[int, Any]:
    k = body["logprobs"]
    if max(k, body.get("prompt_logprobs") or 0) > MOST_LOGPROBS:
        text = f"Requested sample logprobs of {k}, which is greater than max allowed: {MOST_LOGPROBS}"
        return 400, {"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}
    prompts = body["prompt"]
    if isinstance(prompts, str):
        prompts = [server.encode(prompts)]
    elif isinstance(prompts[0], int):
        prompts = [prompts]
    choices, total, cached = [], 0, 0
    for index, ids in enumerate(prompts):
        rows, known = server.rows(ids, len(ids))
        total, cached = total + len(ids), cached + known
        row = rows[-1] / body["temperature"]
        written = int(row.argmin())  # "the sampled token comes too, whatever its rank"
        top = dict(_top(rows[-1], k)) | {written: float(rows[-1][written])}
        assert body["return_tokens_as_token_ids"]
        said = {
            "text_offset": [0],
            "token_logprobs": [top[written]],
            "tokens": [f"token_id:{written}"],
            "top_logprobs": [{f"token_id:{one}": max(logprob, -9999.0) for one, logprob in top.items()}],
        }
        of_prompt = None
        if (wanted := body.get("prompt_logprobs")) is not None:
            of_prompt = [None] + [
                {
                    str(one): {"logprob": logprob, "rank": rank + 1, "decoded_token": "?"}
                    for rank, (one, logprob) in enumerate(_top(before, wanted))
                }
                for before in rows[:-1]
            ]
        choices.append({"index": index, "text": "?", "logprobs": said, "prompt_logprobs": of_prompt})
    usage = {"prompt_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}}
    return 200, {"model": server.name, "choices": choices[::-1], "usage": usage}


def _sglang(server: ModelServer, body: Any) -> tuple[int, Any]:
    ids, k, start = body["input_ids"], body["top_logprobs_num"], body["logprob_start_len"]
    rows, known = server.rows(ids, len(ids))
    # After its temperature, as SGLang does of the tokens that it writes.
    last = (rows[-1] / body["sampling_params"]["temperature"]).log_softmax(-1)

    def entries(row: torch.Tensor) -> list[list[Any]]:
        return [[logprob, one, None] for one, logprob in _top(row, k)]

    meta = {"prompt_tokens": len(ids), "cached_tokens": known, "output_top_logprobs": [entries(last)]}
    if start >= 0:
        meta["input_top_logprobs"] = [None, *map(entries, rows[start:-1])]
    return 200, {"text": "?", "meta_info": meta}


def _llama_cpp(server: ModelServer, body: Any) -> tuple[int, Any]:
    found = []
    for index, ids in enumerate(body["prompt"]):
        rows, known = server.rows(ids, 1)
        top = [
            {"id": one, "token": "?", "logprob": logprob} for one, logprob in _top(rows[-1], body["n_probs"])
        ]
        found.append(
            {
                "index": index,
                "model": server.name,
                "tokens_evaluated": len(ids),
                "timings/cache_n": known,
                "completion_probabilities": [{**top[0], "top_logprobs": top}],
            }
        )
    return 200, found if len(found) > 1 else found[0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def model(self) -> ModelServer:
        return self.server.model  # type: ignore[attr-defined, no-any-return]

    def do_GET(self) -> None:
        found = self.model.get(self.path)
        self.answer(404 if found is None else 200, {"error": "not found"} if found is None else found)

    def do_POST(self) -> None:
        model = self.model
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model.requests.append((self.path, body))
        model.headers = {key.lower(): value for key, value in self.headers.items()}
        known = self.path in ("/tokenize", "/v1/completions", "/generate", "/completion")
        if not known or (model.kind != "openai" and self.path == "/v1/completions"):
            self.answer(404, {"error": "not found"})
            return
        if self.path != "/tokenize" and model.fault is not None and model.fault(self):
            return
        status, answer = model.post(self.path, body)
        if self.path != "/tokenize" and status == 200 and model.change is not None:
            answer = model.change(answer)
        self.answer(status, answer)

    def answer(self, status: int, answer: Any, **headers: str) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *given: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*given)

    def process_request(self, request: Any, address: Any) -> None:
        self._open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        """End the connections that are kept."""
        for one in list(self._open):
            self.shutdown_request(one)

    def handle_error(self, *_: object) -> None:
        """A client that goes away is nothing to report."""
