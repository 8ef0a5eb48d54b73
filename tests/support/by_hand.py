"""Records made by hand: whatever their header says, their checksum is right."""

from __future__ import annotations

import json

import xxhash

from kvgraph.store import format


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    """A record's header and its data section."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def sealed(header: dict, payload: bytes, size: int | None = None) -> bytes:
    """A record of this header and data. size: the header's length that it states, if it isn't the right one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return sealed_text(text + b" " * (-(8 + len(text)) % 64), payload, size)


def sealed_text(text: bytes, payload: bytes, size: int | None = None) -> bytes:
    """A record of this header, as it is."""
    head = (len(text) if size is None else size).to_bytes(8, "little") + text
    checksum = xxhash.xxh3_128_hexdigest(head[format.SEALED :] + payload).encode()
    return head[: format.SEALED - 32] + checksum + head[format.SEALED :] + payload
