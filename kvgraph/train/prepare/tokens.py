"""Measuring text in tokens, for sources that cut or choose by length."""

from __future__ import annotations

import hashlib
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from kvgraph.train.prepare.source import PrepareError

BYTES = "bytes"


class Tokens:
    """A tokenizer that only measures. name: for people. sha256: of the tokenizer; equal hashes measure equally."""

    def __init__(self, tokenizer: Tokenizer, name: str):
        self.tokenizer, self.name = tokenizer, name
        self.sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, path_or_name: str) -> Tokens:
        """The tokenizer of a model: a folder or hub name. Raises ModelError or PrepareError with the reason."""
        from kvgraph.models import load_tokenizer

        found: Any = load_tokenizer(path_or_name)
        if not getattr(found, "is_fast", False):
            raise PrepareError(f"the tokenizer of {path_or_name} doesn't give token offsets; give another --tokenizer")
        return cls(found.backend_tokenizer, path_or_name)

    @classmethod
    def of_bytes(cls) -> Tokens:
        """One token per byte, for the samples, which are short."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
        return cls(tokenizer, BYTES)

    def count(self, text: str) -> int:
        """The number of tokens of a text, without special ones."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters; a character of several tokens ends with its first."""
        return [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]
