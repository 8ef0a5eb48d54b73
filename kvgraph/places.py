"""Places of a store as people write them: a folder or a URL. Nothing shown has a password. Pure Python."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, urlsplit

from kvgraph.errors import StoreError

VARIABLE = "KVGRAPH_STORE"


@dataclass(frozen=True)
class StorePlace:
    """A folder or URL. `text` may hold a password; `str` of it and its repr don't. Raises StoreError."""

    text: str = field(repr=False)
    shown: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", shown(self.text) if self.is_url else self.text)

    def __str__(self) -> str:
        return self.shown

    @property
    def is_url(self) -> bool:
        """Whether it isn't a folder."""
        return "://" in self.text

    @property
    def has_password(self) -> bool:
        """Whether a credential is written in it."""
        if not self.is_url:
            return False
        parts = taken_apart(self.text)
        split = parts.port is not None and "@" in parts.path  # a password with a slash in it
        return parts.password is not None or split or any("pass" in name for name, _ in parse_qsl(parts.query))


def places_of(text: str) -> list[str]:
    """The places in a variable's text: one, or several as a JSON list. Raises StoreError."""
    if not text.lstrip().startswith("["):
        return [text] if text.strip() else []
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(place, str) and place for place in found):
        raise StoreError('several places of a store are a JSON list of texts, such as ["kv", "redis://cache/0"]')
    return found


def taken_apart(url: str) -> SplitResult:
    """The parts of a URL. Raises StoreError, whose message shows none of it but the scheme."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # it raises what is wrong
    except ValueError:  # what it says may show a part of a password
        raise StoreError(
            f"the URL {url.partition('://')[0][:40]}://... of a store can't be read; characters such as / and : in a "
            "password are written as %2F and %3A"
        ) from None
    return parts


def shown(url: str) -> str:
    """A URL without credentials and options. Raises StoreError."""
    parts = taken_apart(url)
    return f"{parts.scheme}://{(parts.netloc + parts.path).rpartition('@')[2]}"
