"""The reference of the HTTP API, from the OpenAPI document that the server itself gives.

docs/reference/http.md holds the comments `<!-- routes -->` and `<!-- objects -->`, whose place the lists take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kvgraph.server.app import create_app
from kvgraph.server.settings import Settings

UNSAID = "Successful Response"  # what FastAPI says for a route that says nothing


def fill(markdown: str) -> str:
    """The page with both comments replaced. Raises ValueError if one of them is missing."""
    document = create_app(Settings(model="MODEL")).openapi()
    for name, lines in (("routes", _routes(document)), ("objects", _objects(document))):
        before, mark, after = markdown.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"http.md lacks the comment <!-- {name} -->")
        markdown = before + "\n".join(lines) + "\n" + after
    return markdown


def _routes(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield f"### `{method.upper()} {path}`\n"
            yield _prose(route.get("description", "")) + "\n"
            if parameters := route.get("parameters"):
                yield "| parameter | in | type | meaning |\n|---|---|---|---|"
                for p in parameters:
                    meaning = f"{p.get('description', '')} {_necessity(p['schema'], p.get('required', False))}"
                    yield f"| `{p['name']}` | {p['in']} | {_type(p['schema'])} | {meaning.strip()} |"
                yield ""
            if body := route.get("requestBody"):
                yield f"Body: {_content(body)}\n"
            for status, answer in route["responses"].items():
                if status < "400":
                    said = "" if answer["description"] == UNSAID else f". {_prose(answer['description'])}"
                    yield f"Answer {status}: {_content(answer)}{said}\n"
    yield ""


def _objects(document: dict[str, Any]) -> Iterator[str]:
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield f"### {name}\n"
        yield _prose(schema.get("description", "")) + "\n"
        yield "| field | type | |\n|---|---|---|"
        for field, inner in schema.get("properties", {}).items():
            yield f"| `{field}` | {_type(inner)} | {_necessity(inner, field in schema.get('required', ()))} |"
        yield ""


def _necessity(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = next((s["default"] for s in (schema, *schema.get("anyOf", ())) if "default" in s), None)
    return "" if default in (None, "", [], {}) else f"default {_value(default)}"


def _content(message: dict[str, Any]) -> str:
    schemas = [media.get("schema") for media in message.get("content", {}).values()]
    return " or ".join(dict.fromkeys(_type(schema) for schema in schemas if schema)) or "text"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words: "list of integer or string"."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(t for s in schema["anyOf"] if (t := _type(s)) != "null")) or "null"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(_value(value) for value in values if value is not None) or "null"
    if "prefixItems" in schema:
        return "[" + ", ".join(map(_type, schema["prefixItems"])) + "]"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) else "object"
    return schema.get("type", "any JSON")


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _prose(text: str) -> str:
    return "\n\n".join(re.sub(r"([<*|])", r"\\\1", " ".join(p.split())) for p in text.split("\n\n"))
