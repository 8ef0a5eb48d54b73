"""Records in one file, to be loaded on another machine: a tar archive without compression.

    kvgraph-export.json                                  which models' records these are
    <fingerprint>/<tenant>/<key>.safetensors             the records, as every tier keeps them

"any" stands for no fingerprint, "all" for no tenant. Nothing in an archive is trusted: names are never paths, and every
record is checked in full.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvgraph.data import io as files
from kvgraph.errors import StoreError
from kvgraph.store import format, signing
from kvgraph.store.base import Entry, is_key
from kvgraph.store.catalog import Catalog
from kvgraph.store.codecs.registry import parse, spec_of
from kvgraph.store.maintenance import Moved, Seen, belongs
from kvgraph.store.record import BadRecord, UnsupportedRecord, UntrustedRecord
from kvgraph.store.remote.base import Space

FORMAT = "kvgraph-export 1"
CONTENTS = "kvgraph-export.json"
SUFFIX = ".safetensors"
MOST = 1 << 20  # bytes of the contents


def export(catalog: Catalog, entries: Iterable[Entry], file: Path, seen: Seen = int) -> Moved:
    """Write records into a file, which appears when it is complete. Each is checked in full. Raises StoreError."""
    if file.exists():
        raise StoreError(f"{file} exists; give another name, or remove it")
    done, entries = Moved(), list(entries)
    models = sorted({(entry.fingerprint, entry.codec) for entry in entries})
    contents = {
        "format": FORMAT,
        "records": len(entries),
        "models": [{"fingerprint": f, "codec": c} for f, c in models],
    }
    with (
        files.errors_named(file, StoreError),
        files.replacing(file) as out,
        tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        _add(tar, CONTENTS, json.dumps(contents).encode())
        for entry in entries:
            data = catalog.read(entry)
            seen()
            if data is None:
                continue
            try:
                format.decode(data, entry.key, entry.fingerprint, tenant=entry.tenant, secret=signing.secret())
            except (BadRecord, UnsupportedRecord, UntrustedRecord) as error:
                done.refused.append((entry.key, str(error)))
                continue
            space = Space(entry.fingerprint or "any", entry.tenant or "all")
            _add(tar, f"{space.fingerprint}/{space.tenant}/{entry.key}{SUFFIX}", data.numpy().data)
            done.records += 1
            done.bytes += data.numel()
    return done


def import_(file: Path, catalog: Catalog, model: str, seen: Seen = int) -> Moved:
    """Take the records of a file into a place. Raises StoreError, before anything is written, unless all are of this model.

    model: its fingerprint, or the beginning of the records' own.
    """
    done = Moved()
    with _opened(file) as tar:
        contents = _contents(tar, file)
        for listed in contents["models"]:
            if not belongs(model, listed["fingerprint"], parse(listed["codec"])):
                raise StoreError(
                    f"{file} holds records of the model with fingerprint {listed['fingerprint'][:16] or '(none)'}, not of "
                    f"{model[:16]}: other weights, dtype or adapter; their KV would be wrong here"
                )
        while (member := tar.next()) is not None:
            seen()
            try:
                entry, data = _record(tar, member)
                if not belongs(model, entry.fingerprint, parse(entry.codec)):
                    raise BadRecord("is of another model")
            except (BadRecord, UnsupportedRecord, UntrustedRecord) as error:
                done.refused.append((member.name[:200], str(error)))
                continue
            if catalog.keep(entry, [data.numpy().data]):
                done.records += 1
                done.bytes += data.numel()
            else:
                done.there += 1
    return done


def count(file: Path) -> int:
    """How many records a file says that it holds. Raises StoreError."""
    with _opened(file) as tar:
        return int(_contents(tar, file)["records"])


@contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise StoreError(f"{file} isn't an export of a store, or is damaged: {error}") from None
    except OSError as error:
        raise StoreError(f"{file} can't be read: {error.strerror or error}") from None


def _contents(tar: tarfile.TarFile, file: Path) -> dict[str, Any]:
    """The first member, checked."""
    first = tar.next()
    try:
        if first is None or first.name != CONTENTS or first.size > MOST:
            raise ValueError
        read = tar.extractfile(first)
        contents: dict[str, Any] = json.loads(read.read() if read is not None else b"")
        if contents["format"] != FORMAT:
            raise StoreError(f"{file} has the format {str(contents['format'])[:40]!r}; this version reads {FORMAT!r}")
        if not isinstance(contents["records"], int) or not isinstance(contents["models"], list):
            raise ValueError
        for listed in contents["models"]:
            if not all(isinstance(listed[name], str) for name in ("fingerprint", "codec")):
                raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(f"{file} isn't an export of a store: it doesn't begin with {CONTENTS}") from None
    return contents


def _record(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[Entry, torch.Tensor]:
    """A member's record, checked in full: its name says what it must hold. Raises BadRecord,
    UnsupportedRecord, UntrustedRecord."""
    words = member.name.removesuffix(SUFFIX).split("/")
    space = Space.read(*words[:2])
    if (
        not member.isfile()
        or space is None
        or len(words) != 3
        or not is_key(words[2])
        or not member.name.endswith(SUFFIX)
    ):
        raise BadRecord("isn't a record of an export")
    read = tar.extractfile(member)
    raw = b"" if read is None else read.read()
    if not raw:
        raise BadRecord("is empty")
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    fingerprint = "" if space.fingerprint == "any" else space.fingerprint
    tenant = "" if space.tenant == "all" else space.tenant
    record = format.decode(data, words[2], fingerprint, tenant=tenant, secret=signing.secret())
    header = format.read_header(data)
    if header.fingerprint != fingerprint:
        raise BadRecord("doesn't say which model it is of")
    when = float(member.mtime)
    entry = Entry(words[2], data.numel(), when, None, False, len(record), fingerprint, spec_of(header.codec), tenant)
    return entry, data


def _add(tar: tarfile.TarFile, name: str, data: bytes | memoryview) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
