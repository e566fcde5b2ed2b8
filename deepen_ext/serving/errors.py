"""What goes wrong, as OpenAI's clients read it: a status and one JSON object. Never a stack trace."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deepen_ext.errors import DeepenError, InputError, MemberLost, OutOfMemory, shown
from deepen_ext.serving.refusals import Busy, Closed, UnknownModel

LOG = logging.getLogger("deepen_ext.serving")

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """A request that is refused, or that failed. FastAPI lets HTTPException pass where it reads a body.

    Attributes:
        status: of HTTP.
        message: for the client.
        param: the field that is wrong.
        code: one word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def refused(message: str, param: str | None = None) -> ApiError:
    """A 400: the request is wrong, and the message says what to do."""
    return ApiError(400, message, param=param)


def from_deepen(error: DeepenError, answer: str | None = None) -> ApiError:
    """What a client is told of an error of ours.

    The message of a model that failed may name files and addresses of this machine: it goes into the log.

    Args:
        error: what went wrong.
        answer: the answer's id, by which its lines in the log are found.
    """
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="busy", retry_after=error.retry_after)
    if isinstance(error, Closed):
        return shutting_down()
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    LOG.error("%s%s: %s", "" if answer is None else f"{answer} ", type(error).__name__, error)
    if isinstance(error, MemberLost):
        return ApiError(502, f"the member {error.member} gives no answer any more", code="member_lost")
    if isinstance(error, OutOfMemory):
        LOG.error("the server goes on; fewer texts are written at once with a smaller --lanes")
        why = f"the member {error.member} ran out of memory; send fewer texts at once, or shorter ones"
        return ApiError(503, why, code="out_of_memory", retry_after=10)
    where = "" if answer is None else f" at {answer}"
    return ApiError(500, f"the model failed; the server's log says how{where}", code="model_failed")


def shutting_down() -> ApiError:
    """The server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)


def add_handlers(app: FastAPI) -> None:
    """Have every error of the app answered in this shape."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def deepen(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DeepenError)
        return from_deepen(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = from_http(request, error).response()
        answer.headers.update(error.headers or {})
        return answer

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        # The class alone: a message may have what a client sent. uvicorn logs the traceback.
        return ApiError(500, f"an error of the server ({type(error).__name__}); see its log").response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(DeepenError, deepen)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def from_http(request: Request, error: HTTPException) -> ApiError:
    """Of the framework's own errors: no such path, a wrong method, a body that is no text."""
    if error.status_code == 404:
        return ApiError(
            404, f"there is nothing at {shown(request.url.path)}; /openapi.json lists what there is"
        )
    if error.status_code == 405:
        return ApiError(405, f"{shown(request.url.path)} does not take {request.method}")
    if error.status_code == 400:
        return refused("the body cannot be read; send JSON in UTF-8, not nested deeply")
    return ApiError(error.status_code, str(error.detail))


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of a body that does not fit: the first field that is wrong, and all that is wrong with it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return refused(f"the body is no JSON ({first['ctx']['error']} at character {first['loc'][-1]})")
    path = _fields(first)
    if not path:
        return refused("send a JSON object, with the header content-type: application/json")
    name = str(path[0])
    if first["type"] == "extra_forbidden":
        return refused(f"{_place(path)} is not supported; leave it out", param=shown_name(name))
    # Behind a field that is no list, pydantic puts the names of its kinds, such as "constrained-str".
    head = path[:2] if len(path) > 1 and isinstance(path[1], int) else path[:1]
    same = [one for one in errors if _fields(one)[: len(head)] == head]
    why = dict.fromkeys(_words(str(one["msg"])) for one in same)
    place = _shared([_fields(one) for one in same]) if len(head) == 2 else head
    return refused(f"{_place(place)}: {'; or '.join(why)}", param=shown_name(name))


def _fields(error: Mapping[str, Any]) -> list[Any]:
    """Where in the body an error is."""
    return [one for one in error["loc"] if one != "body"]


def _shared(paths: Sequence[list[Any]]) -> list[Any]:
    """What all paths begin with."""
    length = 0
    while all(length < len(one) and one[length] == paths[0][length] for one in paths):
        length += 1
    return paths[0][:length]


def shown_name(name: str) -> str:
    """A field's name as a client sent it, cut where it is long."""
    return name if len(name) <= 60 else f"{name[:60]}..."


def _place(path: Sequence[Any]) -> str:
    """`messages[0].name` of what pydantic calls ("messages", 0, "UserMessage", "name")."""
    text = shown_name(str(path[0]))
    for part in path[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{shown_name(str(part))}"
    return text


def _words(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
