"""Looking after a place full of records: what there is, what may go, and taking records elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from kvgraph.errors import StoreError
from kvgraph.store import format, signing
from kvgraph.store.base import Entry, is_tenant, tenant_id
from kvgraph.store.catalog import Catalog
from kvgraph.store.codecs.base import Codec
from kvgraph.store.codecs.registry import fingerprint_with, repacked, spec_of
from kvgraph.store.record import BadRecord, UnsupportedRecord, UntrustedRecord

Seen = Callable[[], object]


@dataclass(frozen=True)
class RecordFilter:
    """Some of a place's records. model: the beginning of a fingerprint; "": every model. tenant: a salt, or what stands for
    it (`kvgraph.store.base.tenant_id`); "": those of no tenant; None: everybody's.
    """

    model: str = ""
    tenant: str | None = None

    def takes(self, entry: Entry) -> bool:
        """Whether it is one of them."""
        if not entry.fingerprint.startswith(self.model):
            return False
        if self.tenant is None:
            return True
        return entry.tenant == (self.tenant if is_tenant(self.tenant) else tenant_id(self.tenant))

    def of(self, catalog: Catalog, details: bool = True, seen: Seen = int) -> list[Entry]:
        """Those in a place. seen: called for each record that is looked at."""
        found = []
        for entry in catalog.entries(details):
            seen()
            if self.takes(entry):
                found.append(entry)
        return found


@dataclass
class Share:
    """What one model's and tenant's records of one codec take in one place."""

    place: str
    tier: str
    model: str
    tenant: str
    codec: str
    records: int = 0
    bytes: int = 0
    tokens: int = 0
    pinned: int = 0
    pinned_bytes: int = 0

    def add(self, entry: Entry) -> None:
        """One more record."""
        self.records += 1
        self.bytes += entry.size
        self.tokens += entry.tokens
        self.pinned += entry.pinned
        self.pinned_bytes += entry.size * entry.pinned


def shares(catalog: Catalog, chosen: RecordFilter, seen: Seen = int) -> list[Share]:
    """A place's records by model, tenant and codec, the largest first."""
    found: dict[tuple[str, str, str], Share] = {}
    for entry in chosen.of(catalog, seen=seen):
        whose = entry.fingerprint, entry.tenant, entry.codec
        if whose not in found:
            found[whose] = Share(catalog.shown, catalog.name, *whose)
        found[whose].add(entry)
    return sorted(found.values(), key=lambda share: -share.bytes)


def garbage(
    entries: Iterable[Entry],
    now: float,
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    quota: int | None = None,
) -> list[Entry]:
    """What to remove, the least recently used first: what wasn't used for `older_than` seconds, then what a tenant has beyond
    `quota` bytes, then what all have beyond `max_bytes`. Pinned records count, and stay.

    Raises StoreError if the place doesn't know when records were used.
    """
    entries = list(entries)
    unknown = next((entry for entry in entries if entry.used is None), None)
    if unknown is not None:
        raise StoreError(
            f"this place doesn't know when its records were used last ({unknown.key[:12]}, for one); a Redis with an LFU "
            "policy doesn't: let it evict by itself (maxmemory)"
        )
    total, held = sum(entry.size for entry in entries), defaultdict[str, int](int)
    for entry in entries:
        held[entry.tenant] += entry.size
    idle = sorted((entry for entry in entries if not entry.pinned), key=lambda entry: (entry.used or 0.0, entry.key))
    victims: dict[int, Entry] = {}
    rules: list[Callable[[Entry], bool]] = [
        lambda entry: older_than is not None and now - (entry.used or 0.0) > older_than,
        lambda entry: quota is not None and held[entry.tenant] > quota,
        lambda entry: max_bytes is not None and total > max_bytes,
    ]
    for rule in rules:
        for at, entry in enumerate(idle):
            if at not in victims and rule(entry):
                victims[at] = entry
                total -= entry.size
                held[entry.tenant] -= entry.size
    return [victims[at] for at in sorted(victims)]


def find(catalog: Catalog, prefix: str, entries: list[Entry]) -> Entry:
    """The record whose key starts with `prefix`, at least 4 digits. Raises StoreError if none or several do."""
    if len(prefix) < 4 or set(prefix) - set("0123456789abcdef") or len(prefix) > 64:
        raise StoreError(f"{prefix[:80]!r} isn't the beginning of a key; give at least 4 of its hex digits")
    found = [entry for entry in entries if entry.key.startswith(prefix)]
    if len(found) != 1:
        raise StoreError(f"{len(found) or 'no'} records start with {prefix!r} in store {catalog.shown}")
    return found[0]


@dataclass
class Moved:
    """What taking records to another place did. bytes: written there. there: records that were there already.
    refused: (key, reason) of records that were damaged or couldn't be read.
    """

    records: int = 0
    bytes: int = 0
    there: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)


def migrate(
    source: Catalog,
    target: Catalog,
    entries: Iterable[Entry],
    codec: Codec | None = None,
    move: bool = False,
    seen: Seen = int,
) -> Moved:
    """Take records to another place, each checked in full before it is written there.

    codec: how they are kept there; None: as they are. move: remove from the source what is in the target then. Source and
    target may be one place: then records are replaced by those of the codec. Raises StoreError, also for a codec that
    would change numbers.
    """
    done, secret = Moved(), signing.secret()
    for entry in entries:
        data = source.read(entry)
        seen()
        if data is None:
            continue
        try:
            record = format.decode(data, entry.key, entry.fingerprint, tenant=entry.tenant, secret=secret)
        except (BadRecord, UnsupportedRecord, UntrustedRecord) as error:
            done.refused.append((entry.key, str(error)))
            continue
        parts: list[bytes | memoryview] = [data.numpy().data]
        if codec is not None and (spec := spec_of(codec)) != entry.codec:
            parts = format.encode(repacked(record, codec), entry.fingerprint, entry.tenant, secret)
            entry = replace(entry, codec=spec)
        if source is target:
            _replaced(target, entry, parts, done)
            continue
        if target.keep(entry, parts):
            done.records += 1
            done.bytes += sum(map(len, parts))
        else:
            done.there += 1
        if entry.pinned:
            target.set_pinned(entry, True)
        if move and not entry.pinned:
            source.remove([entry])
    return done


def _replaced(place: Catalog, entry: Entry, parts: list[bytes | memoryview], done: Moved) -> None:
    """A record in another packing, in the place where it is. Who asks between removing and keeping computes it."""
    parts = [bytes(part) for part in parts]  # a mapped file is about to go
    if entry.pinned:
        place.set_pinned(entry, False)
    place.remove([entry])
    place.keep(entry, parts)
    if entry.pinned:
        place.set_pinned(entry, True)
    done.records += 1
    done.bytes += sum(map(len, parts))


def belongs(model: str, fingerprint: str, codec: Codec) -> bool:
    """Whether a record's fingerprint is that of a model under a codec. model: its fingerprint, or the beginning of the
    record's own.
    """
    return fingerprint.startswith(model) or (len(model) == 64 and fingerprint == fingerprint_with(model, codec))
