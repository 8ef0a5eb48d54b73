"""Small facts remembered between runs (file hashes, passed gates), as JSON files in the user's cache folder.

A lost fact is only worked out again. Therefore nothing here fails: without a writable folder, nothing is remembered.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvgraph.data import io


def recall(name: str, key: str) -> Any:
    """What was remembered under (name, key), or None."""
    return _read(name).get(key)


def remember(name: str, key: str, value: Any) -> None:
    """Remember a JSON value under (name, key); replaces the file atomically."""
    with suppress(OSError, RuntimeError):
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write_json(path, {**_read(name), key: value}, indent=None)


def folder() -> Path:
    """The user's cache folder. Raises RuntimeError where there is no home folder, as in a container with an unknown user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvgraph"


def _path(name: str) -> Path:
    """Raises RuntimeError where there is no home folder."""
    return folder() / f"{name}.json"


def _read(name: str) -> dict[str, Any]:
    try:
        value = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
