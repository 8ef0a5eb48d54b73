"""Methods as text, "name" or "name:field=value,field=value": the parser and the formatter.

A value is a number, true, false, none, plain text, or JSON in brackets or quotes: "cacheblend:selected=[[0,1],[2]]".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kvgraph.errors import GraphError
from kvgraph.methods.base import Method
from kvgraph.methods.registry import BASELINE, fields_of, get, known

_WORDS = {"none": None, "true": True, "false": False}
_PLAIN = re.compile(r"[A-Za-z0-9_.+-]+")  # text that needs no quotes
_JSON = json.JSONDecoder()


def resolve(method: str | Method | None, tuned_for: Iterable[str] = ()) -> Method:
    """The method given as text or as an instance.

    None gives the default: the first known method in `tuned_for` (those that a model declares tuning for), else `full`.
    Raises GraphError for anything else.
    """
    if method is None:
        return get(next(filter(known, tuned_for), BASELINE))
    if isinstance(method, str):
        return parse(method)
    if isinstance(method, type):
        raise GraphError(f"give a method's name or an instance, such as {method.__name__}(), not the class")
    if not isinstance(method, Method):
        raise GraphError(f"give a method's name or an instance, not {type(method).__name__}")
    return method


def parse(spec: str) -> Method:
    """The method of "name" or "name:field=value,field=value".

    Raises GraphError, listing the known names or fields, for an unknown one.
    """
    name, _, rest = spec.partition(":")
    return get(name, **values(rest, f"method {spec[:80]!r}"))


def values(rest: str, what: str) -> dict[str, Any]:
    """The fields of "field=value,field=value". what: begins an error's message. Raises GraphError."""
    found: dict[str, Any] = {}
    while rest:
        item, _, after = rest.partition(",")
        field, equals, value = item.partition("=")
        if equals and value.lstrip()[:1] in ("[", '"'):  # it may contain commas
            found[field.strip()], after = _json(rest.partition("=")[2].lstrip(), what)
        elif equals:
            found[field.strip()] = _value(value.strip())
        elif item:
            raise GraphError(f"{what}: {item!r} isn't FIELD=VALUE")
        rest = after
    return found


def format(method: Method) -> str:
    """The text that `parse` reads as this method: its name, and the fields that differ from the default."""
    pairs = ((field, getattr(method, field.name)) for field in fields_of(method))
    changed = [f"{field.name}={text(value)}" for field, value in pairs if value != field.default]
    return method.name + (":" if changed else "") + ",".join(changed)


def _json(text: str, what: str) -> tuple[Any, str]:
    """(the JSON value that a text begins with, the text after the comma that follows it)."""
    try:
        value, length = _JSON.raw_decode(text)
    except (ValueError, RecursionError):
        raise GraphError(f"{what}: {text[:40]!r} isn't JSON") from None
    behind = text[length:].lstrip()
    if behind and behind[0] != ",":
        raise GraphError(f"{what}: a comma is missing before {behind[:40]!r}")
    return _tuples(value), behind[1:]


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind, longest in ((int, 18), (float, 32)):  # ample, and Python refuses thousands of digits
        with suppress(ValueError):
            if len(text) <= longest:
                return kind(text)
    return text


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def text(value: Any) -> str:
    """A field's value as `values` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str) and _PLAIN.fullmatch(value) and _value(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))
