"""The codecs there are, one line each, and their names: "raw", or "name:field=value,..." for one with fields."""

from __future__ import annotations

from dataclasses import MISSING, fields

from kvgraph.errors import StoreError
from kvgraph.store.codecs.base import Codec
from kvgraph.store.codecs.raw import Raw

CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (Raw,)
}  # fmt: skip


def parse(text: str) -> Codec:
    """The codec that a text names. Raises StoreError, naming what there is, for one that doesn't exist."""
    name, _, given = text.strip().partition(":")
    if name not in CODECS:
        raise StoreError(f"there is no codec {name[:40]!r}; there are {', '.join(CODECS)}")
    values: dict[str, int] = {}
    known = [field.name for field in fields(CODECS[name])]  # type: ignore[arg-type]  # codecs are dataclasses
    for item in filter(None, given.split(",")):
        field, _, value = item.partition("=")
        if field.strip() not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise StoreError(f"codec {name} has no field {field.strip()[:40]!r}; {has}")
        if not value.strip().isdecimal() or len(value) > 9:
            raise StoreError(f"field {field.strip()} of codec {name} is a whole number, not {value.strip()[:40]!r}")
        values[field.strip()] = int(value)
    return CODECS[name](**values)


def spec_of(codec: Codec) -> str:
    """The text that `parse` reads as this codec: its name, and the fields that aren't the default."""
    changed = [
        f"{field.name}={getattr(codec, field.name)}"
        for field in fields(codec)  # type: ignore[arg-type]  # codecs are dataclasses
        if field.default is MISSING or getattr(codec, field.name) != field.default
    ]
    return codec.name + (":" if changed else "") + ",".join(changed)
