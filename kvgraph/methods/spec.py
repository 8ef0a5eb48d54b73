"""Methods as text: "name" or "name:field=value,field=value"."""

from __future__ import annotations

from typing import Any

from kvgraph.errors import GraphError
from kvgraph.methods.base import Method
from kvgraph.methods.registry import get


def parse(spec: str) -> Method:
    """The method of "name" or "name:field=value,field=value", as commands and requests write it.

    Raises GraphError listing what there is.
    """
    name, _, rest = spec.partition(":")
    fields: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        field, equals, value = item.partition("=")
        if not equals:
            raise GraphError(f"method {spec[:80]!r}: {item!r} isn't FIELD=VALUE")
        fields[field.strip()] = _value(value.strip())
    return get(name, **fields)


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text) if len(text) <= 18 else text
        except ValueError:
            continue
    return text
