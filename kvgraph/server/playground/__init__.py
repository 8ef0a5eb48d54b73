"""The playground, a page that shows how caches are composed: its static files, and data about methods."""

from __future__ import annotations

import hashlib
import json
import mimetypes
from dataclasses import fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastapi import APIRouter, Request, Response

from kvgraph import demo, methods
from kvgraph.server.errors import APIError

router = APIRouter(include_in_schema=False)

FILES = ("index.html", "style.css", "app.js", "api.js", "documents.js", "dom.js", "graph.js", "run.js", "icon.svg")
HEADERS = {
    "Cache-Control": "no-cache",  # always asked for again, by ETag
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page itself."""
    return _served(request, "index.html")


@router.api_route("/playground/{file}", methods=["GET", "HEAD"])
async def asset(file: str, request: Request) -> Response:
    """What the page loads."""
    return _served(request, file)


def _served(request: Request, name: str) -> Response:
    if name not in (*FILES, "data.json"):
        raise APIError(404, f"the playground has no file {name[:80]!r}")
    content, etag = _content(name)
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={**HEADERS, "ETag": etag})
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(content, media_type=kind, headers={**HEADERS, "ETag": etag})


@cache
def _content(name: str) -> tuple[bytes, str]:
    """A file's bytes and its ETag."""
    content = json.dumps(data()).encode() if name == "data.json" else files(__package__).joinpath(name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def data() -> dict[str, Any]:
    """The demo corpus, and what can be chosen of each method."""
    rows = [json.loads(line) for line in demo.DOCUMENTS.read_text(encoding="utf-8").split("\n") if line]
    number = {row["id"]: i for i, row in enumerate(rows)}
    makers = {**methods.METHODS, **methods.PRESETS}
    return {
        "documents": [{"title": row["title"], "text": row["text"]} for row in rows],
        "edges": [(number[source], number[reader]) for source, reader in demo.citations()],  # type: ignore[index]
        "questions": demo.questions(),
        "methods": [_described(name, make()) for name, make in makers.items()],
    }


def _described(name: str, method: Any) -> dict[str, Any]:
    hints = get_type_hints(type(method))
    described = [_field(f.name, hints[f.name], getattr(method, f.name)) for f in fields(method)]
    return {
        "name": name,
        "preset": name in methods.PRESETS,
        "reads_edges": method.reads_edges,
        "fields": [field for field in described if field],
    }


def _field(name: str, hint: Any, value: Any) -> dict[str, Any] | None:
    """A field as a form control: one of a few choices (Literal, bool) or a number; None for what no form should ask."""
    if get_origin(hint) is Literal:
        return {"name": name, "value": value, "choices": list(get_args(hint))}
    if hint is bool:
        return {"name": name, "value": value, "choices": [False, True]}
    kinds = {int, float} & {hint, *get_args(hint)}
    return {"name": name, "value": value, "whole": kinds == {int}} if kinds else None
