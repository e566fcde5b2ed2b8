"""The web application: routes, what stands before them, and its schema."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from deepen_ext import __version__
from deepen_ext.serving.errors import add_handlers
from deepen_ext.serving.limits import Gate
from deepen_ext.serving.metrics import Counting
from deepen_ext.serving.page import page_html
from deepen_ext.serving.routes import MODEL_ROUTES, SERVER_ROUTES
from deepen_ext.serving.service import Service

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_OURS = ("Body", "Options", "Message", "Part", "Format")  # how names of our bodies' schemas end


def make_app(service: Service) -> FastAPI:
    """The application of a service."""
    # Pages that show the schema would load scripts from elsewhere; the schema itself is at /openapi.json.
    # A slash more is another path: a redirection would name this server's http, behind a proxy's https too.
    app = FastAPI(
        title="deepen-ext", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.include_router(MODEL_ROUTES)
    app.include_router(MODEL_ROUTES, prefix="/members/{member}", include_in_schema=False)
    app.include_router(SERVER_ROUTES)
    _mount_page(app)
    add_handlers(app)
    limits = service.limits
    app.add_middleware(Gate, key=limits.key, most_bytes=limits.body_bytes, closing=lambda: service.closing)
    app.add_middleware(Counting, metrics=service.metrics)
    found: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not found:
            found.update(_schema(app, service))
        return found

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _mount_page(app: FastAPI) -> None:
    """The page at /. It may load nothing from elsewhere."""
    text = page_html()
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
    headers = {
        "content-security-policy": f"{policy}; img-src data:; base-uri 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)


def _schema(app: FastAPI, service: Service) -> dict[str, Any]:
    """FastAPI's, as the server really is: the models by name, null for what is not given, no 422."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    bodies = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        bodies.pop(name, None)
    for name, body in bodies.items():
        if name.endswith(_OURS):
            _allow_null(body)
    names = [one.name for one in service.models]
    for name in ("CompletionBody", "ChatBody"):
        bodies[name]["properties"]["model"]["enum"] = names
    bodies["Error"] = _ERROR
    if service.limits.key is not None:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema


def _allow_null(body: dict[str, Any]) -> None:
    """null is as good as not given, for every field that may be left out."""
    for name, field in body.get("properties", {}).items():
        if name in body.get("required", ()) or {"type": "null"} in field.get("anyOf", ()):
            continue
        about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
        body["properties"][name] = {"anyOf": [dict(field), {"type": "null"}], **about}
