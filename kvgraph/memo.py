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
    """The value remembered under (name, key), or None."""
    return _read(_folder() / f"{name}.json").get(key)


def remember(name: str, key: str, value: Any) -> None:
    """Remember a JSON value under (name, key). The file is replaced atomically."""
    path = _folder() / f"{name}.json"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write_json(path, {**_read(path), key: value}, indent=None)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvgraph"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
