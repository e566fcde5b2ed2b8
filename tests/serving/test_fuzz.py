"""Bodies made from the schema, right ones and wrong ones: no crash, and the status that the schema names.

DEEPEN_FUZZ_BODIES=10000 for a long run; `make test` has a few hundred.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from running import Running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

BODIES = int(os.environ.get("DEEPEN_FUZZ_BODIES", "240"))
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def schema(served: Running) -> Any:
    found = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    found.config.generation.modes = list(schemathesis.GenerationMode)
    return found


def cheap(body: Any) -> None:
    """Texts of two tokens, so that thousands of bodies take minutes; what is no number stays as it is."""
    if not isinstance(body, dict):
        return
    for name, most in (("max_tokens", 2), ("max_completion_tokens", 2), ("n", 2)):
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    if "messages" in body and body.get("max_tokens") is None and "max_completion_tokens" not in body:
        body["max_tokens"] = 2


@pytest.mark.parametrize("path", POSTS)
def test_bodies_of_the_schema(schema: Any, served: Running, path: str) -> None:
    operation = schema[path]["POST"]
    seen: dict[int, int] = {}
    for mode in schemathesis.GenerationMode:

        @settings(
            max_examples=max(BODIES // (2 * len(POSTS)), 1),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @schemathesis_given(operation, mode)
        def send(case: Any) -> None:
            cheap(case.body)
            response = case.call(timeout=60)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            case.validate_response(response, checks=CHECKS)

        send()
    assert seen[200] > 0, seen
    assert seen[400] > 0, seen
    assert served.idle()


def schemathesis_given(operation: Any, mode: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy(generation_mode=mode))


def test_the_schema_names_what_there_is(served: Running) -> None:
    found = served.ask("/openapi.json")[1]
    assert set(POSTS) < set(found["paths"])
    for path in POSTS[:2]:
        operation = found["paths"][path]["post"]
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(operation["responses"])
        assert "422" not in operation["responses"]
    body = found["components"]["schemas"]["CompletionBody"]
    assert body["properties"]["model"]["enum"] == [one.name for one in served.service.models]
    assert body["additionalProperties"] is False
