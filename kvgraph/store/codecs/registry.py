"""The registry of codecs, and codecs as text: "raw", "kivi:bits=2,group=32", "kivi+zstd:level=9"."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from kvgraph.errors import StoreError
from kvgraph.registry import Registry
from kvgraph.store.codecs.base import Codec, InPlace
from kvgraph.store.codecs.fp8 import FP8
from kvgraph.store.codecs.gear import GEAR
from kvgraph.store.codecs.int8 import Int8
from kvgraph.store.codecs.kivi import KIVI
from kvgraph.store.codecs.raw import Raw
from kvgraph.store.codecs.zstd import Zstd
from kvgraph.store.record import PackedKV, PackedSide, Record


def _wrong(name: str, codec: Any) -> str:
    """What is wrong with a codec of another package, or nothing."""
    if not (isinstance(codec, type) and is_dataclass(codec) and hasattr(codec, "pack") and hasattr(codec, "unpack")):
        return "it isn't a dataclass with pack and unpack"
    return "" if codec.name == name else f"the codec's name is {codec.name!r}"  # type: ignore[attr-defined]  # or it raises


CODECS: Registry[type[Codec]] = Registry(
    {codec.name: codec for codec in (Raw, FP8, Int8, KIVI, GEAR, Zstd)}, "kvgraph.codecs", _wrong
)
"""Codecs by name. Other packages add some in the group "kvgraph.codecs"; see `kvgraph.registry`."""


def parse(text: str) -> Codec:
    """The codec of a text: a name, its fields after a colon, and "+zstd" to compress its output.

    Raises StoreError, listing the known ones, for an unknown codec.
    """
    below, plus, last = text.rpartition("+")
    if not plus:
        return _one(text)
    codec = _one(last)
    if not isinstance(codec, Zstd):
        raise StoreError(f"only zstd can follow another codec, not {last[:40]!r}")
    inner = _one(below)
    if isinstance(inner, Zstd):
        raise StoreError("zstd after zstd gains nothing; leave one out")
    return replace(codec, over=inner)


def spec_of(codec: Codec) -> str:
    """The text that `parse` reads as this codec: its name, and the fields that aren't the default."""
    if isinstance(codec, Zstd) and codec.over != Raw():
        return f"{spec_of(codec.over)}+{spec_of(replace(codec, over=Raw()))}"
    changed = [
        f"{field.name}={getattr(codec, field.name)}"
        for field in fields(codec)  # type: ignore[arg-type]  # codecs are dataclasses
        if field.name != "over" and getattr(codec, field.name) != field.default
    ]
    return codec.name + (":" if changed else "") + ",".join(changed)


def packed(record: Record, codec: Codec) -> Record:
    """The record with its KV packed by a codec, and unpacked again, as every reader will see it."""
    # Laid out as a reader finds them: a product of matrices can depend on strides in its last bit.
    tensors = {name: tensor.contiguous().view(-1).view(tensor.shape) for name, tensor in codec.pack(record).items()}
    keys, values = record.keys, record.values
    if not codec.lossless:
        keys, values = codec.unpack(tensors, record.held, keys[0].dtype)
    return replace(record, keys=keys, values=values, packed=PackedKV(spec_of(codec), tensors))


def repacked(record: Record, codec: Codec) -> Record:
    """A stored record as another codec keeps it, every number as it is: zstd comes or goes.

    Raises StoreError for a codec that loses something else than what the record's has lost: that is another record with
    another key, which only encoding can make.
    """
    old = Raw() if record.packed is None else parse(record.packed.codec)
    if _lossy(old) != _lossy(codec):
        raise StoreError(
            f"a record kept as {spec_of(old)} can't become {spec_of(codec)}: what a codec loses is part of a record's key; "
            "encode the documents again with it"
        )
    tensors: Mapping[str, Tensor] = Raw().pack(record) if record.packed is None else record.packed.tensors
    if isinstance(old, Zstd):
        tensors = old.unwrapped(tensors)
    if isinstance(codec, Zstd):
        tensors = codec.wrapped(tensors)
    return replace(record, packed=None if isinstance(codec, Raw) else PackedKV(spec_of(codec), tensors))


def reads_in_place(codec: Codec) -> bool:
    """Whether attention on CPUs reads its records as they are packed: int8 and KIVI. zstd over one is taken off first."""
    return isinstance(codec.over if isinstance(codec, Zstd) else codec, InPlace)


def in_place(record: Record) -> Record:
    """A record as memory keeps it for attention on a CPU: packed alone if its codec can be read in place, else unpacked."""
    if record.packed is None:
        return record
    codec, tensors = parse(record.packed.codec), record.packed.tensors
    if isinstance(codec, Zstd) and reads_in_place(codec):
        tensors = codec.unwrapped(tensors)
        codec = codec.over
    if not isinstance(codec, InPlace):
        return replace(record, packed=None)

    def side(name: str, kv: Tensor) -> PackedSide:
        heads, tokens, size = kv.shape
        unpack = partial(codec.part, tensors, name, tokens, dtype=kv.dtype)
        return PackedSide((heads, tokens, size), kv.dtype, kv.device, unpack)

    layers = tuple(
        (side(f"keys.{i}", k), side(f"values.{i}", v))
        for i, (k, v) in enumerate(zip(record.keys, record.values, strict=True))
    )
    return replace(record, keys=(), values=(), packed=PackedKV(spec_of(codec), tensors, layers))


def fingerprint_with(fingerprint: str, codec: Codec) -> str:
    """The fingerprint of a model whose spans a codec has packed: the model's own, unless the codec is lossy."""
    if codec.lossless:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {_lossy(codec)}".encode()).hexdigest()


def _lossy(codec: Codec) -> str:
    """The part of a codec's text that changes numbers, with all its fields, because defaults may change."""
    if isinstance(codec, Zstd):
        return _lossy(codec.over)
    values = [f"{f.name}={getattr(codec, f.name)}" for f in fields(codec)]  # type: ignore[arg-type]  # dataclasses
    return f"{codec.name}:{','.join(values)}"


def _one(text: str) -> Codec:
    name, _, given = text.strip().partition(":")
    if name not in CODECS:
        raise StoreError(f"there is no codec {name[:40]!r}; there are {', '.join(CODECS)}")
    values: dict[str, int] = {}
    known = [f.name for f in fields(CODECS[name]) if f.name != "over"]  # type: ignore[arg-type]  # dataclasses
    for item in filter(None, given.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise StoreError(f"codec {name} has no field {key[:40]!r}; {has}")
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise StoreError(f"field {key} of codec {name} is a whole number, not {value[:40]!r}")
        values[key] = int(value)
    return CODECS[name](**values)
