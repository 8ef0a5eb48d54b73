"""What is searched, what is found, and what an embedding model must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvgraph.errors import KVGraphError


class RetrievalError(KVGraphError):
    """Passages can't be found: a bad collection, no such model, files of another collection or model."""


class Retrievable(Protocol):
    """A passage. Stored segments and documents are some.

    One that has `tokens` (a list of them, or None) is counted by these where a search has a budget, others by words.
    """

    @property
    def id(self) -> str:
        """Its name; no two of an index have the same."""

    @property
    def title(self) -> str:
        """Its title, or ""."""

    @property
    def text(self) -> str:
        """Its text."""


class Hit(NamedTuple):
    """A passage that was found. score: higher is better; it compares hits of one search.

    via: the id of the passage that led here, which reads it; "" if the question did.
    """

    id: str
    title: str
    score: float
    via: str = ""


class Embedder(Protocol):
    """What turns texts into vectors whose dot product is their similarity. name: changes whenever the vectors do."""

    name: str
    width: int

    def questions(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32."""

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32."""


def read_as(title: str, text: str) -> str:
    """What is searched of a passage: title and text, as Contriever's own retrieval does it."""
    return f"{title} {text}".strip()
