"""Signatures of records: who may write to a store that several machines share.

A checksum tells a damaged record from a whole one, but anybody can compute it. A signature (HMAC-SHA256, RFC 2104) needs
a secret that only trusted writers and readers have. The secret comes from the environment variable KVGRAPH_STORE_KEY.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable

from kvgraph.errors import StoreError

VARIABLE = "KVGRAPH_STORE_KEY"
LEAST = 16  # characters of a secret
DIGITS = 64  # hex digits of a signature


def secret() -> bytes:
    """The secret of this process; empty if none is set. Raises StoreError for one that is too short."""
    found = os.environ.get(VARIABLE, "")
    if found and len(found) < LEAST:
        raise StoreError(
            f"{VARIABLE} must have at least {LEAST} characters, not {len(found)}; make one with: openssl rand -hex 32"
        )
    return found.encode()


def signature(secret: bytes, parts: Iterable[bytes | memoryview]) -> bytes:
    """The hex digits of the parts' signature, read one after the other."""
    sign = hmac.new(secret, digestmod="sha256")
    for part in parts:
        sign.update(part)
    return sign.hexdigest().encode("ascii")
