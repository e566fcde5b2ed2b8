"""The endpoints. Each member alone has the same ones below /members/NAME, as an address of its own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from deepen_ext import __version__
from deepen_ext.serving.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from deepen_ext.serving.errors import refused
from deepen_ext.serving.models import Model, Models
from deepen_ext.serving.service import Service
from deepen_ext.serving.tokens import TokenTexts

_ERRORS = {
    400: "The body is wrong; the message says what to do.",
    401: "No API key, or a wrong one.",
    404: "No such model, or no such path.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "Busy; Retry-After says when to try again.",
    500: "A model failed.",
    502: "A member in another place failed.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
}
_SCHEMA = {"$ref": "#/components/schemas/Error"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _SCHEMA}}}
    for status, text in _ERRORS.items()
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with stream: true a stream of chunks.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": _EVENT},
        },
    }
}


async def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


async def _models(request: Request) -> Models:
    """All of them; below a member's address that member alone."""
    models = (await _service(request)).models
    name = request.path_params.get("member")
    return models if name is None else models.member(name)


_Service = Annotated[Service, Depends(_service)]
_Models = Annotated[Models, Depends(_models)]

# At the root for all models, and below each member's address for that member.
MODEL_ROUTES = APIRouter(responses=RESPONSES)
SERVER_ROUTES = APIRouter()


@MODEL_ROUTES.post("/v1/completions", responses=_STREAM)
async def completions(body: CompletionBody, service: _Service, models: _Models) -> Response:
    """Continue one or more prompts."""
    return await service.completion(models, body)


@MODEL_ROUTES.post("/v1/chat/completions", responses=_STREAM)
async def chat_completions(body: ChatBody, service: _Service, models: _Models) -> Response:
    """Answer a chat. Each member reads it by its own chat template."""
    return await service.chat(models, body)


@MODEL_ROUTES.get("/v1/models")
async def list_models(models: _Models) -> dict[str, Any]:
    """What is served."""
    return {"object": "list", "data": [one.card() for one in models]}


@MODEL_ROUTES.get("/v1/models/{model:path}")
async def show_model(model: str, models: _Models) -> dict[str, Any]:
    """One of the models."""
    return models.named(model).card()


@MODEL_ROUTES.post("/tokenize")
def tokenize(body: TokenizeBody, models: _Models) -> dict[str, Any]:
    """The main model's ids of a text, as vLLM tells them."""
    model = _model(models, body.model)
    if body.text is None:
        raise refused("there is no text; give it as prompt", "prompt")
    if body.parse_special:
        raise refused("parse_special is not supported; leave it out", "parse_special")
    vocabulary = model.main.vocabulary
    special = body.add_special_tokens if body.add_special is None else body.add_special
    ids = [*(vocabulary.prefix_ids if special else ()), *vocabulary.encode(body.text)]
    return {"tokens": ids, "count": len(ids), "max_model_len": model.main.context_length}


@MODEL_ROUTES.post("/detokenize")
def detokenize(body: DetokenizeBody, models: _Models) -> dict[str, Any]:
    """The text of some ids of the main model."""
    model = _model(models, body.model)
    if body.tokens and max(body.tokens) >= model.main.vocab_size:
        raise refused(f"tokens of {model.main.name} are below {model.main.vocab_size}", "tokens")
    return {"prompt": TokenTexts(model.main).plain(body.tokens)}


@MODEL_ROUTES.get("/version")
async def version() -> dict[str, Any]:
    """Of deepen-ext."""
    return {"version": __version__}


@SERVER_ROUTES.head("/health", include_in_schema=False)  # as probes such as `wget --spider` ask
@SERVER_ROUTES.get("/health", responses={503: RESPONSES[503]})
async def health(response: Response, service: _Service) -> dict[str, Any]:
    """200 while requests are taken."""
    load = service.engine.load
    state = "shutting down" if service.closing else "failed" if service.engine.closed else "ok"
    response.status_code = 200 if state == "ok" else 503
    return {"status": state, "running": load.running, "reading": load.reading, "waiting": load.waiting}


@SERVER_ROUTES.get("/metrics", responses={401: RESPONSES[401]})
async def metrics(service: _Service) -> Response:
    """For Prometheus."""
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _model(models: Models, name: str | None) -> Model:
    """The one that is named; without a name the first one."""
    return next(iter(models)) if name is None else models.named(name)
