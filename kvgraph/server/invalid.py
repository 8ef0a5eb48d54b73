"""What is wrong with a body, in one line that names the field, from what pydantic found.

Pydantic reports every branch of a union, in words about Python and with tags in the path. Here one thing is told: the
first field that is wrong, as deep as it can be named, with a code of OpenAI's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kvgraph.server.errors import APIError

CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "too_short": "array_below_min_length",
    "too_long": "array_above_max_length",
    "string_too_short": "string_below_min_length",
    "string_too_long": "string_above_max_length",
    "greater_than": "number_below_min_value",
    "greater_than_equal": "number_below_min_value",
    "less_than": "number_above_max_value",
    "less_than_equal": "number_above_max_value",
}
Found = tuple[tuple[str | int, ...], dict[str, Any]]  # (path within the body, pydantic's error)


def told(errors: Sequence[dict[str, Any]], body: Any) -> APIError:
    """The error that the client gets. errors: pydantic's, of one validation; body: the JSON that was sent."""
    if errors[0]["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    if errors[0]["loc"][0] in ("path", "query"):
        name = str(errors[0]["loc"][-1])
        return APIError(400, f"{name} {_words(errors[0])}", param=name, code=_code(errors[0]))
    found = [(_path(error, body), error) for error in errors]
    first = found[0][0][:1]
    path, error = max((item for item in found if item[0][:1] == first), key=_weight)
    if (name := error.get("ctx", {}).get("param")) is not None:  # found by the object that holds the field
        named = ".".join(map(str, (*path, name)))
        return APIError(400, str(error["msg"]).replace(name, named, 1), param=named, code=_code(error))
    param = ".".join(map(str, path)) or None
    wrong = [_words(e) for p, e in found if p == path and _is_type(e) == _is_type(error)]
    what = " or ".join(dict.fromkeys(wrong)).replace(" or must be", " or")
    message = f"{param or 'the body'} {what}" if param or what.startswith("must ") else what
    return APIError(400, message, param=param, code=_code(error))


def _code(error: dict[str, Any]) -> str:
    return CODES.get(error["type"], "invalid_type" if _is_type(error) else "invalid_value")


def _path(error: dict[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body the error is: its location without the tags of unions and the names of models."""
    parts, here = [], body
    location = error["loc"][1:]
    for i, part in enumerate(location):
        inside = isinstance(here, dict) and part in here
        if inside or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            parts.append(part)
            here = here[part]
        elif i == len(location) - 1 and error["type"] == "missing":
            parts.append(part)
    return tuple(parts)


def _weight(item: Found) -> tuple[int, bool]:
    """A deeper path says more; at the same place, a value of the right type that is wrong says more than a wrong type."""
    path, error = item
    return len(path) + ("param" in error.get("ctx", {})), not _is_type(error)


def _is_type(error: dict[str, Any]) -> bool:
    return error["type"].endswith(("_type", "_parsing", "_attributes_type"))


def _words(error: dict[str, Any]) -> str:
    """What is wrong, to stand behind the field's name."""
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "extra_forbidden":
        return "is not a known field"
    if error["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return "must be an object"
    text = re.sub(r"^Value error, ", "", str(error["msg"])).replace(" after validation", "")
    return re.sub(r"^(Input|String|List|Tuple|Value) should ", "must ", text).replace("valid list", "list")
