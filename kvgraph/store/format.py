"""One record as the bytes of one safetensors file. docs/reference/format.md specifies them.

The header is written by hand for two reasons: tensor data starts 64-byte aligned, and the checksum stands at a fixed
offset at the front, so that it covers every byte after itself, including header and padding. Files aren't trusted when
they are read.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from kvgraph.errors import StoreError
from kvgraph.store.base import is_key, is_tenant
from kvgraph.store.codecs.base import CODES, DTYPES, Codec
from kvgraph.store.codecs.raw import Raw
from kvgraph.store.codecs.registry import parse, spec_of
from kvgraph.store.record import BadRecord, PackedKV, Record, UnsupportedRecord, UntrustedRecord
from kvgraph.store.signing import DIGITS, signature

VERSION = "1"
ALIGN = 64  # bytes; a cache line
OPENINGS = 5  # tries to open a file that others replace at the same time
MAX_HEADER = 1 << 20  # bytes; 100 layers take 20 kB

MAGIC = b'{"__metadata__":{"kvgraph":"'  # the first bytes of the JSON of every version
START = 8 + MAX_HEADER  # bytes at the front of a file that hold its header, whatever it says
PREFIX = MAGIC + VERSION.encode() + b'","xxh3_128":"'
SEALED = 8 + len(PREFIX) + 32  # the checksum's 32 hex digits end here; it covers everything from here to the end
SIGNATURE = b'","signature":"'  # follows the checksum in a signed record
SIGNED = SEALED + len(SIGNATURE) + DIGITS  # the signature covers bytes 0 to 8, and everything from here to the end

INTS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
ITEMSIZE = {code: dtype.itemsize for code, dtype in DTYPES.items()}
_KV_DTYPES = ("F32", "F16", "BF16")


class TensorInfo(NamedTuple):
    """A line of the header's table: dtype code, shape, first byte in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Header:
    """A parsed header. data: the offset of the data section in the file; tensors: the table, in file order."""

    key: str
    fingerprint: str
    codec: Codec
    dtype: torch.dtype | None  # of the KV once unpacked; None: that of the tensors
    tenant: str  # see `kvgraph.store.base.tenant_id`
    tokens: int
    data: int
    tensors: dict[str, TensorInfo]


def encode(record: Record, fingerprint: str = "", tenant: str = "", secret: bytes = b"") -> list[bytes | memoryview]:
    """The record's file as buffers to write one after the other. Contiguous CPU tensors aren't copied.

    fingerprint: the model's, or empty. tenant: what stands for it (`kvgraph.store.base.tenant_id`), or empty. secret: to
    sign the record with, or empty. Raises StoreError for a record that the format can't hold.
    """
    _check_encodable(record)
    packed = record.packed or PackedKV("raw", Raw().pack(record))
    tensors = {name: t.detach().contiguous() for name, t in packed.tensors.items()}
    buffers = [t.view(torch.uint8).numpy().reshape(-1).data for t in tensors.values()]
    table = [
        (name, CODES[t.dtype], list(t.shape), b.nbytes) for (name, t), b in zip(tensors.items(), buffers, strict=True)
    ]
    # Positions come last, so that KV starts aligned for any number of tokens.
    positions = np.ascontiguousarray(record.positions.numpy(), dtype="<i8")
    table.append(("positions", "I64", [len(record)], positions.nbytes))
    kept = [np.ascontiguousarray(t.numpy(), dtype="<i4") for t in record.kept or ()]
    table += [(f"positions.{i}", "I32", list(t.shape), t.nbytes) for i, t in enumerate(kept)]

    header: dict[str, Any] = {
        "__metadata__": {
            "kvgraph": VERSION,
            "xxh3_128": "0" * 32,
            **({"signature": "0" * DIGITS} if secret else {}),
            "key": record.key,
            "fingerprint": fingerprint,
            **({"tenant": tenant} if tenant else {}),
            "codec": packed.codec,
            "tokens": str(len(record)),
            **({} if packed.codec == "raw" else {"dtype": CODES[record.keys[0].dtype]}),
        }
    }
    offset = 0
    for name, dtype, shape, nbytes in table:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > MAX_HEADER:
        raise StoreError(f"a record's header of {len(text)} bytes is over the format's limit of {MAX_HEADER}")

    head = bytearray(len(text).to_bytes(8, "little") + text)
    buffers += [t.view(np.uint8).reshape(-1).data for t in (positions, *kept)]
    if secret:
        head[SIGNED - DIGITS : SIGNED] = signature(secret, [bytes(head[:8]), bytes(head[SIGNED:]), *buffers])
    checksum = xxhash.xxh3_128(bytes(head[SEALED:]))
    for buffer in buffers:
        checksum.update(buffer)
    head[SEALED - 32 : SEALED] = checksum.hexdigest().encode("ascii")
    return [bytes(head), *buffers]


def map_file(path: str | Path, ahead: bool = False) -> tuple[torch.Tensor, os.stat_result]:
    """The file as uint8 [bytes], mapped into memory: read on demand, in place, and valid after the file is unlinked.

    With it the file's stat, from which its size was taken: reading past a mapped file's end would kill the process.
    ahead: let the system begin to read all of it now.
    Raises FileNotFoundError, OSError (it can't be opened or mapped now), BadRecord (not a regular file, or empty).
    """
    for _ in range(OPENINGS):
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BadRecord("isn't a regular file")
        if info.st_size == 0:
            raise BadRecord("is empty")
        if ahead:
            _read_ahead(path)
        try:  # a private mapping: the file can't change through it. Unlike mmap.mmap it keeps no descriptor open.
            data = torch.from_file(str(path), shared=False, size=info.st_size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(f"can't map {path}: {error}") from error
        if identity(os.stat(path)) == identity(info):
            return data, info
    raise OSError(f"{path} was replaced each time it was opened")


def _read_ahead(path: str | Path) -> None:
    """Let the system read all of a file in the background, which is faster than page by page when they are looked at."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def read_file(
    path: str | Path, most: int | None = None, memory: Callable[[int], torch.Tensor] = _bytes
) -> tuple[torch.Tensor, os.stat_result]:
    """As `map_file`, but read into memory now, at most so many bytes: what happens to the file later changes nothing.

    memory: gives so many bytes of it, [bytes] uint8 on the CPU.
    """
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise BadRecord("isn't a regular file")
        if info.st_size == 0:
            raise BadRecord("is empty")
        data = memory(info.st_size if most is None else min(most, info.st_size))
        size = file.readinto(data.numpy().data)
    if size == 0:
        raise BadRecord("is empty")
    return data[:size], info


def identity(info: os.stat_result) -> tuple[int, int, int]:
    """A value that distinguishes versions of a file without reading it."""
    return info.st_ino, info.st_mtime_ns, info.st_size


def decode(
    data: torch.Tensor,
    key: str,
    fingerprint: str = "",
    verify: bool = True,
    tenant: str | None = None,
    secret: bytes = b"",
) -> Record:
    """The record in `data` (uint8 [bytes], a whole file); its KV are views of it, kept alive by them.

    key: the one asked for. fingerprint: the model's, if it is to be compared; a record that states none passes, since
    the key covers it. tenant: what stands for the one who asks; None for anybody's. verify: compare the checksum, and
    refuse NaN and infinity. secret: what the record must be signed with; empty: signatures aren't looked at. Raises
    BadRecord, UnsupportedRecord, UntrustedRecord; never returns other KV. Threads that ask for more records at once than
    there are processors but one wait here.
    """
    with _GATE.inside:
        return _decoded(data, key, fingerprint, verify, tenant, secret)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 2


class _Gate:
    """Lets so many threads check a record at once that one processor is free for the model."""

    def __init__(self) -> None:
        self.open()
        os.register_at_fork(after_in_child=self.open)  # what another thread held would never be given back

    def open(self) -> None:
        """Begin with nobody inside."""
        self.inside = threading.Semaphore(max(1, processors() - 1))


_GATE = _Gate()


def _decoded(data: torch.Tensor, key: str, fingerprint: str, verify: bool, tenant: str | None, secret: bytes) -> Record:
    if secret:
        check_signature(data, secret)  # covers what the checksum covers
    elif verify:
        check_sum(data)
    header = read_header(data)
    if header.key != key:
        raise BadRecord(f"holds the record {header.key}")
    if fingerprint and header.fingerprint not in ("", fingerprint):
        raise BadRecord(f"was written for the model with fingerprint {header.fingerprint}")
    if tenant is not None and header.tenant not in ("", tenant):
        raise UnsupportedRecord("belongs to another tenant")

    kv = {name: _tensor(data, header, info) for name, info in header.tensors.items() if not _is_positions(name)}
    positions = _positions(data, header)
    kept = _kept(data, header, positions)
    held = kept[0].shape[1] if kept else header.tokens
    try:
        keys, values = header.codec.unpack(kv, held, header.dtype)
    except (RuntimeError, ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise BadRecord(f"can't be unpacked: {type(error).__name__}") from error
    _check_kv(keys, values, held)
    if kept and [t.shape[0] for t in kept] != [t.shape[0] for t in keys]:
        raise BadRecord("has positions of other layers and heads than its keys")
    if verify and not all(map(_is_finite, (*keys, *values))):
        raise BadRecord("holds numbers that aren't finite")
    packed = None if isinstance(header.codec, Raw) else PackedKV(spec_of(header.codec), kv)
    return Record(key, keys, values, positions, packed, kept)


def _tensor(data: torch.Tensor, header: Header, info: TensorInfo) -> torch.Tensor:
    """A view of a tensor's bytes; a copy if they aren't aligned."""
    size = ITEMSIZE[info.dtype]
    begin = header.data + info.begin
    there = data[begin : begin + size * math.prod(info.shape)]
    if (data.storage_offset() + begin) % size:
        there = there.clone()
    # Unlike reshape, as_strided gives a dimension of one element the stride that it would have with more.
    return there.view(DTYPES[info.dtype]).as_strided(info.shape, _strides(info.shape))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def check_sum(data: torch.Tensor) -> None:
    """Compare the checksum of a whole file (uint8 [bytes]). Raises BadRecord, UnsupportedRecord."""
    raw = data.numpy()
    stated = _front(raw)[SEALED - 32 :]
    if xxhash.xxh3_128_hexdigest(raw[SEALED:].data).encode("ascii") != stated:
        raise BadRecord("is damaged: its checksum doesn't match")


def check_signature(data: torch.Tensor, secret: bytes) -> None:
    """Compare the signature of a whole file (uint8 [bytes]). Raises BadRecord, UnsupportedRecord, UntrustedRecord."""
    raw = data.numpy()
    _front(raw)
    front = raw[SEALED:SIGNED].tobytes()
    signed = front.startswith(SIGNATURE)
    if signed and hmac.compare_digest(front[-DIGITS:], signature(secret, [raw[:8].tobytes(), raw[SIGNED:].data])):
        return
    check_sum(data)  # is it damaged, or whole and somebody else's?
    raise UntrustedRecord("has a signature made with another secret" if signed else "isn't signed")


def read_header(data: torch.Tensor, size: int | None = None) -> Header:
    """Parse and check the header of a file (uint8 [bytes]): all of it, but not the checksum nor any tensor data.

    data: the whole file, or its first bytes, at least START or all there are, of `size`. Raises BadRecord, UnsupportedRecord.
    """
    raw = data.numpy()
    length = int.from_bytes(_front(raw)[:8], "little")
    begin = 8 + length
    if length > MAX_HEADER or begin > raw.nbytes or begin % ALIGN:
        raise BadRecord(f"states a header of {length} bytes, which is impossible")
    try:
        table = json.loads(raw[8:begin].tobytes().decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise BadRecord("has a header that isn't JSON") from error
    meta = table.pop("__metadata__")
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise BadRecord("has malformed metadata")
    try:
        codec = parse(meta.get("codec", ""))
    except StoreError as error:
        raise UnsupportedRecord(f"is stored with codec {meta.get('codec')!r}: {error}") from None
    key, tokens, fingerprint = meta.get("key", ""), meta.get("tokens", ""), meta.get("fingerprint")
    if not is_key(key) or not (tokens.isascii() and tokens.isdigit() and len(tokens) < 10) or fingerprint is None:
        raise BadRecord("has malformed metadata")
    tenant = meta.get("tenant", "")
    if tenant and not is_tenant(tenant):
        raise BadRecord(f"states a tenant {tenant[:40]!r}, which has 16 hex digits")
    dtype = meta.get("dtype")
    if dtype is not None and dtype not in _KV_DTYPES:
        raise BadRecord(f"states the dtype {dtype!r}, which KV can't have")
    dtype = None if dtype is None else DTYPES[dtype]
    header = Header(
        key, fingerprint, codec, dtype, tenant, int(tokens), begin, _table(table, (size or raw.nbytes) - begin)
    )
    _check_tensors(header)
    return header


def _front(raw: np.ndarray) -> bytes:
    """The bytes up to the end of the checksum."""
    front = raw[:SEALED].tobytes()
    if len(front) < SEALED or front[8 : 8 + len(MAGIC)] != MAGIC:
        raise BadRecord("isn't a kvgraph record")
    if front[8 : 8 + len(PREFIX)] != PREFIX:
        raise UnsupportedRecord(f"has another record format than version {VERSION}")
    return front


def _table(table: dict[str, Any], size: int) -> dict[str, TensorInfo]:
    """The header's lines, checked: known dtypes, bytes that fit the shapes, data without gaps from 0 to `size`."""
    tensors = {}
    offset = 0
    for name, line in table.items():
        try:
            dtype, shape, (begin, end) = line["dtype"], line["shape"], line["data_offsets"]
            nbytes = ITEMSIZE[dtype]
            for extent in shape:
                if type(extent) is not int or extent < 1:
                    raise ValueError
                nbytes *= extent
        except (KeyError, TypeError, ValueError) as error:
            raise BadRecord(f"has a malformed line for tensor {name!r}") from error
        if type(begin) is not int or type(end) is not int or begin != offset or end != begin + nbytes:
            raise BadRecord(f"has offsets for tensor {name!r} that don't fit its shape and place")
        tensors[name] = TensorInfo(dtype, tuple(shape), begin)
        offset = end
    if offset != size:
        raise BadRecord(f"has {size} bytes of data where its header says {offset}")
    return tensors


def _check_tensors(header: Header) -> None:
    """positions [N]; the rest is the codec's business."""
    info = header.tensors.get("positions")
    if info is None:
        raise BadRecord("doesn't hold positions")
    if info.shape != (header.tokens,) or info.dtype not in INTS:
        raise BadRecord(f"has positions of dtype {info.dtype} and shape {list(info.shape)}, which is impossible")


def _check_kv(keys: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...], tokens: int) -> None:
    """Keys and values [G, N, D] of one float dtype."""
    for tensor in (*keys, *values):
        right = tensor.dim() == 3 and tensor.shape[1] == tokens and tensor.dtype == keys[0].dtype
        if not right or CODES[tensor.dtype] not in _KV_DTYPES:
            found = f"{CODES[tensor.dtype]} {list(tensor.shape)}"
            raise BadRecord(f"has keys or values {found} for {tokens} tokens, which is impossible")


def _positions(data: torch.Tensor, header: Header) -> torch.Tensor:
    """[N] int64, copied, because they may be unaligned in the file."""
    info = header.tensors["positions"]
    begin = header.data + info.begin
    raw = data.numpy()[begin : begin + ITEMSIZE[info.dtype] * header.tokens].tobytes()
    positions = np.frombuffer(raw, INTS[info.dtype]).astype(np.int64)
    if positions[0] != 0 or (np.diff(positions) <= 0).any():
        raise BadRecord("has positions that don't ascend from 0")
    return torch.from_numpy(positions)


def _is_positions(name: str) -> bool:
    return name == "positions" or name.startswith("positions.")


def _kept(data: torch.Tensor, header: Header, positions: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Positions [G, K] int32 of the tokens that every layer and head holds, copied; None if that is all of them."""
    infos = {name: info for name, info in header.tensors.items() if name.startswith("positions.")}
    if not infos:
        return None
    if infos.keys() != {f"positions.{layer}" for layer in range(len(infos))}:
        raise BadRecord("doesn't hold the positions of every layer")
    width = infos["positions.0"].shape[-1]
    kept = []
    for layer in range(len(infos)):
        info = infos[f"positions.{layer}"]
        if info.dtype != "I32" or len(info.shape) != 2 or info.shape[1] != width or not width < header.tokens:
            raise BadRecord(f"has positions of dtype {info.dtype} and shape {list(info.shape)}, which is impossible")
        found = _tensor(data, header, info).clone()
        if bool((found.diff(dim=1) <= 0).any()) or not bool(torch.isin(found, positions.int()).all()):
            raise BadRecord("holds tokens at positions that don't ascend or aren't the span's")
        kept.append(found)
    return tuple(kept)


_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether it contains neither NaN nor infinity.

    Their bits, read as integers, are above those of all finite numbers of the same sign. Taking the largest integer, first with
    and then without a sign, is several times faster than anything that computes with 16-bit floats on a CPU.
    """
    if tensor.numel() == 0:
        return True
    signed = _INTEGERS[tensor.dtype]
    infinity = int(torch.tensor(torch.inf, dtype=tensor.dtype).view(signed))
    bits = tensor.view(signed).numpy()
    negative = 1 << (8 * tensor.itemsize - 1)
    return int(bits.max()) < infinity and int(bits.view(f"u{tensor.itemsize}").max()) < infinity + negative


def _check_encodable(record: Record) -> None:
    kv = (*record.keys, *record.values)
    dtypes = {t.dtype for t in kv}
    if not is_key(record.key):
        raise StoreError(f"{record.key!r} isn't a record's key, which has 64 lower-case hex digits")
    if not kv or len(record) == 0:
        raise StoreError(f"record {record.key[:12]} is empty; there is nothing to keep")
    if len(dtypes) > 1 or CODES.get(kv[0].dtype) not in _KV_DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        raise StoreError(f"record {record.key[:12]} has dtype {found}; the store keeps float32, float16 or bfloat16")
    if any(t.device.type != "cpu" for t in kv):
        raise StoreError(f"record {record.key[:12]} isn't in CPU memory; move it there before it is stored")
    if (record.held < len(record)) != (record.kept is not None):
        raise StoreError(f"record {record.key[:12]} has KV of {record.held} tokens, but {len(record)} positions")
    for t in kv:
        if t.dim() != 3 or t.shape[1] != record.held or 0 in t.shape or t.shape[1] > len(record):
            raise StoreError(f"record {record.key[:12]} has KV of shape {list(t.shape)} for {len(record)} tokens")
        if not _is_finite(t):
            raise StoreError(f"record {record.key[:12]} contains NaN or infinite numbers; it isn't stored")
