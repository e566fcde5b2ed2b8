"""What is refused: the right status, a message that names the field, and nothing of the server's insides."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from losing_backend import backend_of, losing
from running import ASSISTANT, MAIN, PROMPT, Running, serving, slow, until

from deepen_ext import Ensemble
from deepen_ext.errors import ModelError
from deepen_ext.serving.errors import from_deepen
from deepen_ext.serving.limits import Gate

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
COMPLETION: dict[str, Any] = {"model": "deepen", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": "deepen",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 2,
    "temperature": 0,
}
IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (COMPLETIONS, {"best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": [10**7]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt"),
        (COMPLETIONS, {"prompt": [PROMPT] * 100, "n": 2}, "n"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs"),
        (COMPLETIONS, {"logprobs": 129, "model": MAIN}, "logprobs"),
        (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo"),
        (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": "2"}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 2.5}, "max_tokens"),
        (COMPLETIONS, {"temperature": -1}, "temperature"),
        (COMPLETIONS, {"temperature": True}, "temperature"),
        (COMPLETIONS, {"top_p": 0}, "top_p"),
        (COMPLETIONS, {"n": 0}, "n"),
        (COMPLETIONS, {"stop": [""]}, "stop"),
        (COMPLETIONS, {"stop": ["a"] * 17}, "stop"),
        (COMPLETIONS, {"seed": 1 << 70}, "seed"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"99999999": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"1": 101}}, "logit_bias"),
        (COMPLETIONS, {"presence_penalty": 3}, "presence_penalty"),
        (COMPLETIONS, {"draft": 33}, "draft"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"fuser": "os:system"}, "fuser"),
        (COMPLETIONS, {"fuser": "nobody"}, "fuser"),
        (COMPLETIONS, {"fuser": "average", "model": MAIN}, "fuser"),
        (COMPLETIONS, {"weights": [1.0], "model": MAIN}, "weights"),
        (COMPLETIONS, {"nobody_knows_this": 1}, "nobody_knows_this"),
        (CHATS, {"tools": [{"type": "function"}]}, "tools"),
        (CHATS, {"tool_choice": "auto"}, "tool_choice"),
        (CHATS, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHATS, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        (CHATS, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        (CHATS, {"messages": []}, "messages"),
        (CHATS, {"top_logprobs": 3}, "top_logprobs"),
        (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHATS, {"max_completion_tokens": 3}, "max_tokens"),
        (CHATS, {"prompt": "x"}, "prompt"),
    ],
)
def test_a_400_names_the_field(served: Running, path: str, more: dict[str, Any], field: str) -> None:
    error = served.refused(path, {**(COMPLETION if path == COMPLETIONS else CHAT), **more})
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"fuser": "draw"}, "temperature"),
        ({"fuser": "spans", "temperature": None}, "temperature"),
        ({"fuser": "spans", "presence_penalty": 1}, "presence_penalty"),
        ({"fuser": "spans", "frequency_penalty": 1}, "frequency_penalty"),
        ({"fuser": "spans", "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"fuser": "spans", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 1e-31}, "temperature"),
        ({"repetition_penalty": 1e-31}, "repetition_penalty"),
    ],
)
def test_advice_is_in_the_fields_of_a_request(served: Running, more: dict[str, Any], field: str) -> None:
    """A request has no do_sample: a client that followed the engine's words was refused once more."""
    for path, body in ((COMPLETIONS, COMPLETION), (CHATS, CHAT)):
        error = served.refused(path, {**body, **more})
        assert error["param"] == field
        assert field in error["message"]
        assert not re.search("do_sample|Processor|CountPenalty", error["message"])


def test_advice_for_an_ensemble_that_draws(pair: Ensemble) -> None:
    with serving({"deepen": pair.variant(fuser="draw")}) as running:
        assert running.refused(COMPLETIONS, COMPLETION)["param"] == "temperature"
        status, answer, _ = running.ask(COMPLETIONS, {**COMPLETION, "temperature": 1})
        assert status == 200, answer
        status, answer, _ = running.ask(COMPLETIONS, {**COMPLETION, "model": MAIN})
        assert status == 200, answer


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": [IMAGE]}, {"role": "tool"}], "messages[0].content"),
        (["x"], "messages[0]"),
        ("x", "messages"),
    ],
)
def test_a_400_says_which_message(served: Running, messages: Any, place: str) -> None:
    error = served.refused(CHATS, {**CHAT, "messages": messages})
    assert error["message"].startswith(f"{place}: ")
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt": "word " * 20000}, "context"),
        ({"weights": [0.1, 0.2, 0.7]}, "weights"),
        ({"weights": [0.9, 0.9]}, "weights"),
        ({"fuser": "draw"}, "sampl"),
    ],
)
def test_what_the_engine_refuses(served: Running, more: dict[str, Any], words: str) -> None:
    assert words in served.refused(COMPLETIONS, {**COMPLETION, **more})["message"]


def test_a_prompt_without_text_does_not_hold_others_up(pair: Ensemble) -> None:
    """Half of a character: the assistant, which has no BOS here, reads nothing. It must not wait for room."""
    main, assistant = pair.members
    vocabulary = copy.copy(assistant.vocabulary)
    vocabulary.prefix_ids = []
    half = next(i for i, text in enumerate(main.vocabulary.tokens) if text == b"\xe6")
    crawling = [slow(main, 0.05), replace(assistant, vocabulary=vocabulary)]
    with serving({"deepen": Ensemble(crawling, fuser="deepen")}) as running:
        stream = running.client().completions.create(stream=True, **{**COMPLETION, "max_tokens": 60})
        next(iter(stream))
        error = running.refused(COMPLETIONS, {**COMPLETION, "prompt": [half]})
        assert f"{ASSISTANT}: the prompt gives no tokens" in error["message"]
        assert running.busy() == 1
        stream.close()


def test_null_is_as_good_as_not_given(served: Running) -> None:
    nothing = {"stop": None, "n": None, "suffix": None, "tools": None, "logit_bias": None, "user": None}
    status, answer, _ = served.ask(COMPLETIONS, {**COMPLETION, **nothing})
    assert status == 200, answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "no JSON"),
        (b"", "send a JSON object"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"\xff\xff", "UTF-8"),
        (b'{"model": "deepen", "prompt": "\xc3\x28"}', "UTF-8"),
        (b'{"model": "deepen", "prompt": "\\ud800"}', "prompt"),
        (b"[" * 100_000, "JSON"),
        (b'{"model": "deepen", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "deepen", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_bodies_that_are_no_requests(served: Running, body: bytes, words: str) -> None:
    assert words in served.refused(COMPLETIONS, body)["message"]


def test_a_body_of_another_type(served: Running) -> None:
    """A page of another site could send one without asking; JSON it cannot."""
    error = served.refused(COMPLETIONS, json.dumps(COMPLETION).encode(), content_type="text/plain")
    assert "application/json" in error["message"]


def test_what_there_is_not(served: Running) -> None:
    error = served.refused(COMPLETIONS, {**COMPLETION, "model": "gpt-7"}, 404)
    assert error["code"] == "model_not_found"
    assert "deepen" in error["message"]
    assert served.refused("/v1/embeddings", {}, 404)["type"] == "not_found_error"
    assert served.ask("/v1/models/nobody")[0] == 404
    assert served.ask("/members/nobody/v1/models")[0] == 404
    assert served.ask(f"/members/{MAIN}/v1/completions", {**COMPLETION, "model": "deepen"})[0] == 404
    assert served.ask(COMPLETIONS, method="PUT")[0] == 405
    assert f"{COMPLETIONS}/" in served.refused(f"{COMPLETIONS}/", COMPLETION, 404)["message"]  # not sent on


def test_models_are_listed(client: openai.OpenAI, served: Running, pair: Ensemble) -> None:
    models = {one.id: one for one in client.models.list().data}
    assert list(models) == ["deepen", MAIN, ASSISTANT]
    assert client.models.retrieve("deepen").id == "deepen"
    card: Any = models["deepen"]
    assert card.owned_by == "deepen-ext"
    assert card.max_model_len == pair.members[0].context_length
    assert card.deepen["members"] == pair.names
    (alone,) = served.ask(f"/members/{ASSISTANT}/v1/models")[1]["data"]
    assert alone["id"] == ASSISTANT
    assert alone["deepen"]["kind"] == "member"


def test_health_and_metrics(served: Running) -> None:
    status, answer, _ = served.ask("/health")
    assert (status, answer["status"]) == (200, "ok")
    with served.raw() as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    served.ask(COMPLETIONS, COMPLETION)
    served.ask(COMPLETIONS, {**COMPLETION, "suffix": "x"})
    served.ask("/v1/whatever", {})
    text = served.ask("/metrics")[1].decode()
    values = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) ([\d.e+]+)$", text, re.MULTILINE))
    assert float(values['deepen_ext_http_responses_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values['deepen_ext_http_responses_total{path="/v1/completions",status="400"}']) >= 1
    assert float(values['deepen_ext_http_responses_total{path="other",status="404"}']) >= 1
    assert float(values['deepen_ext_model_tokens_total{model="deepen"}']) >= 2
    assert float(values['deepen_ext_first_token_seconds_count{model="deepen"}']) >= 1
    assert float(values['deepen_ext_between_tokens_seconds_count{model="deepen"}']) >= 1
    assert float(values["deepen_ext_tokens_total"]) >= 2
    assert "whatever" not in text


def test_health_of_an_engine_that_ended(pair: Ensemble) -> None:
    with serving({"deepen": pair}) as running:
        running.service.engine.close()
        status, answer, _ = running.ask("/health")
        assert (status, answer["status"]) == (503, "failed")


KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def guarded(pair: Ensemble) -> Iterator[Running]:
    with serving({"deepen": pair}, key=KEY, body_bytes=10_000) as running:
        yield running


def test_keys(guarded: Running) -> None:
    wrong = ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY})
    for headers in wrong:
        error = guarded.refused(COMPLETIONS, COMPLETION, 401, **headers)
        assert error["code"] == "invalid_api_key"
        assert KEY not in json.dumps(error)
    for path in ("/v1/models", "/metrics", "/openapi.json", f"/members/{MAIN}/v1/models", "/version"):
        status, _, headers = guarded.ask(path)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
    assert guarded.ask("/health")[0] == 200
    status, page, headers = guarded.ask("/")  # it asks for the key itself
    assert status == 200
    assert b"<html" in page
    assert KEY.encode() not in page
    assert "connect-src 'self'" in headers["content-security-policy"]
    status, answer, _ = guarded.ask(COMPLETIONS, COMPLETION, authorization=f"Bearer {KEY}")
    assert status == 200, answer
    with pytest.raises(openai.AuthenticationError):
        guarded.client().models.list()
    assert guarded.client(api_key=KEY).models.list().data


def test_large_bodies_are_not_read(guarded: Running) -> None:
    """With a length and without one."""
    key = {"authorization": f"Bearer {KEY}"}
    body = json.dumps({**COMPLETION, "prompt": "x" * 20_000}).encode()
    assert "10,000" in guarded.refused(COMPLETIONS, body, 413, **key)["message"]
    with guarded.raw() as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        connection.sendall(
            f"{head}content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(11):
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepen_ext.serving.limits.BODY_SECONDS", 0.2)
    with guarded.raw() as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return True

    monkeypatch.setattr("hmac.compare_digest", compare)
    gate = Gate(None, key="right", most_bytes=1, closing=lambda: False)  # type: ignore[arg-type]
    assert gate._allowed("/v1/models", b"Bearer guess")
    assert seen == [(b"guess", b"right")]


def test_prompts_are_logged_only_where_asked(pair: Ensemble, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the secret of the lighthouse"
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level(logging.DEBUG), serving({"deepen": pair}, log_prompts=log_prompts) as running:
            running.ask(COMPLETIONS, {**COMPLETION, "prompt": secret})
            running.refused(COMPLETIONS, {**COMPLETION, "prompt": secret, "suffix": secret})
            running.refused(COMPLETIONS, {**COMPLETION, "prompt": {secret: secret}})
            assert until(lambda: "2 tokens" in caplog.text)
        assert (secret in caplog.text) == log_prompts


def test_a_request_has_a_time_limit(pair: Ensemble, caplog: pytest.LogCaptureFixture) -> None:
    crawling = Ensemble([slow(pair.members[0], 0.05), pair.members[1]], fuser="deepen")
    with caplog.at_level(logging.INFO), serving({"deepen": crawling}, seconds=1.5) as running:
        error = running.refused(COMPLETIONS, {**COMPLETION, "max_tokens": 200}, 504)
        assert error["code"] == "timeout"
        body = {**COMPLETION, "max_tokens": 200, "stream": True}
        status, answer, _ = running.ask(COMPLETIONS, body)
        assert status == 200
        *chunks, last, _ = answer.decode().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert chunks
        assert running.idle(5)
        # The log counts what came, of a text that never ended.
        assert until(lambda: re.search(r"out of time, 0 of 1 texts, [1-9]\d* tokens", caplog.text))


def test_an_error_of_the_server_tells_nothing(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("/home/somebody/secret.py")

    monkeypatch.setattr("deepen_ext.serving.asking.completion", broken)
    counted = f'deepen_ext_http_responses_total{{path="{COMPLETIONS}",status="500"}} 1.0'
    assert counted not in served.ask("/metrics")[1].decode()
    error = served.refused(COMPLETIONS, COMPLETION, 500)
    assert "secret" not in json.dumps(error)
    assert "RuntimeError" in error["message"]
    assert counted in served.ask("/metrics")[1].decode()


def test_texts_without_an_end_are_counted_and_told(pair: Ensemble, caplog: pytest.LogCaptureFixture) -> None:
    """A stream that fails has the status 200: nothing else shows an operator that it did."""
    members = [slow(pair.members[0], 0.02), losing(pair.members[1])]
    ensemble = Ensemble(members, fuser="deepen")
    with caplog.at_level(logging.INFO), serving({"deepen": ensemble}, seconds=3.0) as running:
        long = {**COMPLETION, "max_tokens": 300}

        def counted(reason: str) -> bool:
            series = f'deepen_ext_texts_total{{finish_reason="{reason}",model="deepen"}}'
            return f"{series} 2.0" in running.ask("/metrics")[1].decode()

        stream = running.client().completions.create(stream=True, n=2, **long)
        next(iter(stream))
        stream.close()
        assert until(lambda: counted("cancelled"))
        running.refused(COMPLETIONS, {**long, "n": 2}, 504)
        assert until(lambda: counted("timeout"))
        assert running.idle()
        backend_of(members[1]).arm(5)
        _, answer, _ = running.ask(COMPLETIONS, {**long, "n": 2, "stream": True})
        assert '"code":"member_lost"' in answer.decode()
        assert until(lambda: counted("failed"))
        (line,) = re.findall(r"(cmpl-\w+) deepen: failed", caplog.text)
        assert f"{line} MemberLost: " in caplog.text  # which text an error is of
        assert line in answer.decode()


def test_a_500_says_where_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    error = from_deepen(ModelError("/home/somebody/model"), "cmpl-7")
    assert (error.status, error.code) == (500, "model_failed")
    assert error.message.endswith("the server's log says how at cmpl-7")
    assert "cmpl-7 ModelError: /home/somebody/model" in caplog.text


def test_busy(pair: Ensemble) -> None:
    crawling = Ensemble([slow(pair.members[0], 0.05), pair.members[1]], fuser="deepen")
    with serving({"deepen": crawling}, engine={"lanes": 1, "queue": 1}) as running:
        client = running.client()
        stream = client.completions.create(stream=True, **{**COMPLETION, "max_tokens": 100})
        next(iter(stream))
        waiting = running.raw()
        body = json.dumps({**COMPLETION, "max_tokens": 100}).encode()
        waiting.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert until(lambda: running.busy() == 2)
        status, answer, headers = running.ask(COMPLETIONS, COMPLETION)
        assert status == 429, answer
        assert int(headers["retry-after"]) >= 1
        assert answer["error"]["code"] == "busy"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**COMPLETION)
        stream.close()
        waiting.close()
        assert running.idle(5)
        assert running.ask(COMPLETIONS, COMPLETION)[0] == 200


def test_more_texts_than_may_wait(pair: Ensemble) -> None:
    """A 429 would have the client try again for ever."""
    with serving({"deepen": pair}, engine={"lanes": 8, "queue": 2}) as running:
        status, answer, _ = running.ask(COMPLETIONS, {**COMPLETION, "n": 3, "temperature": 1})
        assert status == 400
        assert "the request has 3 texts" in answer["error"]["message"]
        assert "--queue" in answer["error"]["message"]
        assert running.ask(COMPLETIONS, {**COMPLETION, "n": 2, "temperature": 1})[0] == 200
