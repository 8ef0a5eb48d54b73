"""What a single token stands for: its bytes, and a name that no other token of a list has.

A decoder turns a whole list of tokens into text, and gives U+FFFD for half a character and nothing for the space before a
first word. So bytes come from the vocabulary itself, by the two conventions there are: byte-level BPE writes every byte
as one printable character (GPT-2), SentencePiece writes a space as "▁" and a byte as "<0xEF>".
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from kvgraph.engine.sampling import Sampled

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """The bytes and names of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text. A special token has those of its name."""
        if (added := self._added.get(token)) is not None:
            return added.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the output layer that the vocabulary doesn't have
            return b""
        if "ByteLevel" in self._decoders and all(char in BYTE_OF for char in piece):
            return bytes(BYTE_OF[char] for char in piece)
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if "▁" in self._replaced or "Metaspace" in self._decoders:
            return piece.replace("▁", " ").encode()
        return self._tokenizer.decode([token]).encode("utf-8", "replace")

    def name(self, token: int) -> str:
        """A token as text; `bytes:\\xf0\\x9f`, as OpenAI writes it, where it is only a part of a character."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def names(self, sampled: Sampled) -> dict[int, str]:
        """Distinct names of the chosen token, which has its usual one, and of the likeliest.

        Where two tokens are the same text, the later is called as the vocabulary writes it, or by its number.
        """
        found: dict[str, int] = {}
        for token in dict.fromkeys([sampled.token, *(token for token, _ in sampled.top)]):
            names = (self.name(token), self._tokenizer.convert_ids_to_tokens(token), f"token_id:{token}")
            found[next(name for name in names if name is not None and name not in found)] = token
        return {token: name for name, token in found.items()}

    def is_byte(self, token: int) -> bool:
        """Whether it stands for one byte in a vocabulary of larger pieces."""
        if "ByteFallback" not in self._decoders or token in self._added:
            return False
        return _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def is_special(self, token: int) -> bool:
        """Whether texts leave it out."""
        return token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(i for i, added in self._tokenizer.added_tokens_decoder.items() if added.special)

    @cached_property
    def _added(self) -> Mapping[int, str]:
        return {token: str(added) for token, added in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _decoders(self) -> frozenset[str]:
        return frozenset(part["type"] for part in self._parts)

    @cached_property
    def _replaced(self) -> frozenset[str]:
        return frozenset(part["pattern"].get("String", "") for part in self._parts if part["type"] == "Replace")

    @cached_property
    def _parts(self) -> list[dict[str, Any]]:
        """The steps of the tokenizer's decoder; none for a tokenizer that isn't of the `tokenizers` library."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        return list(_flat(decoder)) if decoder else []


class Offsets:
    """Where in a text each token begins, in characters, as the tokens come."""

    def __init__(self, tokens: TokenNames):
        self._tokens, self._length = tokens, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = b""  # of tokens that are single bytes, which decoders take together

    def __call__(self, token: int, shown: bool | None = None) -> int:
        """The offset of the next token: of the character it begins or continues.

        shown: whether the text holds it; None: as usual, if it isn't special.
        """
        data = self._tokens.bytes(token)
        if self._tokens.is_byte(token):
            before = len(self._run.decode("utf-8", "ignore"))  # unless the run is found to be no text
            self._run += data
            try:
                codecs.getincrementaldecoder("utf-8")().decode(self._run)
            except UnicodeDecodeError:
                before = len(self._run) - 1
            return max(0, self._length + before)
        self._end_run()
        if not (shown if shown is not None else not self._tokens.is_special(token)):
            return max(0, self._length)
        begun, _ = self._decoder.getstate()  # of a character
        first = self._decoder.decode(data[:1])
        whole = begun + data[:1] == "\ufffd".encode()  # which a text may hold too
        broken = bool(begun) and first.startswith("\ufffd") and not whole  # by a byte that doesn't continue it
        at = self._length + broken
        self._length += len(first) + len(self._decoder.decode(data[1:]))
        return max(0, at)

    def _end_run(self) -> None:
        """Bytes that are no text become one U+FFFD each, all of a run."""
        try:
            self._length += len(self._run.decode())
        except UnicodeDecodeError:
            self._length += len(self._run)
        self._run = b""

    def skip(self, characters: int) -> None:
        """The text lacks so many characters that the next tokens have."""
        self._length -= characters


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder


def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_level()
