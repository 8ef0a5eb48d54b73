"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the status that clients act on."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kvgraph.data.library import LibraryError, NotStoredError, TakenError
from kvgraph.errors import CapacityError, GraphError, KVGraphError, ModelError, PlanError, StoreError
from kvgraph.server import logs
from kvgraph.server.runner import Stopped

log = logging.getLogger("kvgraph.server")


class ErrorBody(BaseModel):
    """What went wrong, in one line; `param` names the field and `code` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorBody


class APIError(KVGraphError):
    """An error with its HTTP status; `retry_after` in seconds where trying again later makes sense."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


class LostError(APIError):
    """What answered is gone, in the middle of an answer that was partly sent, or each time it was tried."""

    def __init__(self) -> None:
        super().__init__(
            503, "the replica that answered has failed; send the request again", code="replica_lost", retry_after=1
        )


TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
DECLARED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request is invalid; the message says where.",
        401: "The API key is missing or unknown.",
        404: "Not found.",
        405: "The method isn't allowed.",
        408: "The body took too long to arrive.",
        409: "It exists with other content, or is in use.",
        413: "The request is too large.",
        415: "The body isn't JSON, or is compressed.",
        429: "Too many requests; try again after Retry-After seconds.",
        500: "An error of the server.",
        503: "Not ready, or shutting down.",
        504: "The deadline has passed.",
    }.items()
}
"""Responses that every route declares in the OpenAPI document."""


def report(error: BaseException) -> APIError:
    """The error that the client gets. It is noted for the access line, and logged if the server caused it."""
    told = as_api_error(error)
    exchange = logs.current.get()
    if exchange is not None:
        exchange.error = told.code or str(told.status)
    if told.status == 500:
        log.error("a request failed", exc_info=error)
    return told


def as_api_error(error: BaseException) -> APIError:
    """Any error as one with a status. Errors that a client can fix are 4xx; unexpected ones are 500 without details."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, NotStoredError):
        return APIError(404, str(error), param=error.param)
    if isinstance(error, TakenError):
        return APIError(409, str(error), param=error.param, code="conflict")
    if isinstance(error, LibraryError):
        return APIError(400, str(error), param=error.param)
    if isinstance(error, CapacityError | PlanError):
        return APIError(400, str(error), code="context_length_exceeded")
    if isinstance(error, Stopped):
        return APIError(503, str(error), code="shutting_down", retry_after=1)
    if isinstance(error, ModelError | StoreError):
        return APIError(500, str(error))
    if isinstance(error, KVGraphError):
        return APIError(400, str(error), code="invalid_graph" if isinstance(error, GraphError) else "invalid_value")
    return APIError(500, "an unexpected error; the server's log has the details")


def body(error: APIError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    detail = ErrorBody(message=printable(str(error)), type=kind, param=error.param, code=error.code)
    return {"error": detail.model_dump()}


def response(error: APIError) -> JSONResponse:
    """The HTTP response of an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(error), error.status, headers)


def printable(text: str, most: int = 1000) -> str:
    """One line without lone surrogates, so that it can be sent as UTF-8."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= most else line[: most - 1] + "…"
