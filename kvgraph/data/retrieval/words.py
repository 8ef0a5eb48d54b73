"""Search by words: BM25, in the library bm25s (arXiv 2407.03618), which scores with numpy alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvgraph.data.retrieval.base import RetrievalError

WIDE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without spaces: each character is a word
WORD = re.compile(rf"[{WIDE}]|[^\W{WIDE}]+")
K1, B = 1.2, 0.75  # as in Lucene


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without a plural's s."""
    return [_singular(word) for word in WORD.findall(text.casefold())]


def _singular(word: str) -> str:
    """An English plural as its singular, by the rules of Harman's S stemmer ("How effective is suffixing?", 1991)."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y" if len(word) > 4 else word
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1] if len(word) > 3 else word
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1] if len(word) > 3 else word
    return word


class WordIndex:
    """The words of passages in a folder of files, which are mapped."""

    def __init__(self, folder: Path):
        self._bm25 = _library().BM25.load(folder, mmap=True)

    @classmethod
    def build(cls, folder: Path, texts: Iterable[str]) -> WordIndex:
        """Index texts. Raises OSError."""
        vocabulary: dict[str, int] = {"": 0}  # no word; an index needs one
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] or [0] for text in texts]
        bm25 = _library().BM25(method="lucene", k1=K1, b=B)
        bm25.index((ids, vocabulary), show_progress=False, create_empty_token=False)
        bm25.save(folder, show_progress=False)
        return cls(folder)

    def scores(self, query: str) -> np.ndarray:
        """The score of each passage [n] float32; 0 for one that has no word of the query."""
        asked = [word for word in words(query) if word in self._bm25.vocab_dict]
        if not asked:
            return np.zeros(self._bm25.scores["num_docs"], np.float32)
        return self._bm25.get_scores(asked)


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise RetrievalError("to search by words, install bm25s: pip install 'kvgraph[retrieval]'") from None
    return bm25s
