"""Every error of an application leaves it in OpenAI's shape, and its OpenAPI document says so."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvgraph.errors import KVGraphError
from kvgraph.server import errors, invalid
from kvgraph.server.errors import APIError


def install(app: FastAPI) -> None:
    """Let all errors of an application's routes be answered here."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        for operation in (o for path in document["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)  # the framework's own shape, which `wrong` replaces
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.exception_handler(KVGraphError)
    async def known(_: Request, error: KVGraphError) -> JSONResponse:
        return errors.response(errors.report(error))

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        return errors.response(errors.report(invalid.told(error.errors(), error.body)))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        paths = app.openapi()["paths"]
        route = request.scope.get("route")
        if error.status_code == 404 and route is None:
            there = ", ".join(paths)
            return errors.response(APIError(404, f"there is no such route; the routes are {there}", code="unknown_url"))
        if isinstance(error.__cause__, UnicodeDecodeError):  # compressed, but not named as such, or in another encoding
            return errors.response(
                APIError(400, "the body isn't UTF-8 text; send JSON, uncompressed", code="invalid_json")
            )
        made = errors.response(APIError(error.status_code, str(error.detail)))
        made.headers.update(error.headers or {})
        documented = paths.get(getattr(route, "path_format", None))
        if error.status_code == 405 and documented:  # the framework knows only the methods of the path's first route
            made.headers["Allow"] = ", ".join(sorted(method.upper() for method in documented))
        return made
