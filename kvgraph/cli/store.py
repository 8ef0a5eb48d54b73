"""`kvgraph store ...`: inspect and maintain a store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvgraph.cli import common
from kvgraph.cli.common import Json, StorePlaces
from kvgraph.errors import StoreError
from kvgraph.places import StorePlace
from kvgraph.progress import Progress

if TYPE_CHECKING:
    from kvgraph.store.base import Entry
    from kvgraph.store.catalog import Catalog, VerifyReport
    from kvgraph.store.maintenance import Moved, RecordFilter

Older = Annotated[
    float | None,
    typer.Option(parser=common.parse_duration, metavar="TIME", help="Remove records unused for this long, e.g. 7d."),
]
MaxSize = Annotated[
    int | None,
    typer.Option(
        parser=common.parse_size, metavar="SIZE", help="Then remove the least recently used down to this size."
    ),
]
Quota = Annotated[
    int | None,
    typer.Option(
        parser=common.parse_size, metavar="SIZE", help="Before that, from each tenant that has more than this."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="FINGERPRINT", help="Only records of this model: the first digits of its fingerprint."
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option("--tenant", help='Only records of this tenant, by name or as `stats` shows it; "": of none.'),
]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or their first digits.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def store() -> None:
    """Inspect and maintain a store of KV records: a folder, or a URL.

    Every command works on what it is given with --store, or on the variable KVGRAPH_STORE. Records of all models and
    tenants there are meant, unless --model and --tenant say otherwise. Nothing that isn't kvgraph's is ever touched.

    \b
      kvgraph store stats --store kv --store redis://127.0.0.1:6379/0
      kvgraph store gc --store kv --max-size 10GiB
    """


@app.command()
def ls(
    store: StorePlaces = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of records to show.")] = 50,
    model: Model = "",
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """List records, the most recently used first.

    \b
      kvgraph store ls --store kv --limit 10
    """
    chosen = _filter(model, tenant)
    now = time.time()
    for catalog in _opened(store):
        entries = sorted(_listed(catalog, chosen), key=lambda entry: -(entry.used or 0.0))
        if as_json:
            for entry in entries[:limit]:
                typer.echo(json.dumps({"store": catalog.shown} | asdict(entry)))
            continue
        table = common.table("key", "tokens", "size", "last used", "model", "tenant", "pinned", "codec")
        for e in entries[:limit]:
            used = "" if e.used is None else f"{common.human_time(max(0.0, now - e.used))} ago"
            table.add_row(
                *(e.key[:16], f"{e.tokens:,}", common.human_size(e.size), used, e.fingerprint[:8], e.tenant[:8]),
                *("yes" if e.pinned else "", e.codec),
            )
        common.show(table)
        if len(entries) > limit:
            typer.echo(f"... and {len(entries) - limit:,} more; see --limit")


@app.command()
def stats(
    store: StorePlaces = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also show what a running server has found, missed and failed at, by tier."),
    ] = None,
    model: Model = "",
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Show what a store holds, by place, model, tenant and codec, and how often it helped.

    Hit rates are a running server's, from its /metrics: give its address with --server.

    \b
      kvgraph store stats --store kv --store s3://bucket/prefix
      kvgraph store stats --store kv --server http://127.0.0.1:8771
    """
    from kvgraph.store.maintenance import shares

    chosen = _filter(model, tenant)
    found, quarantined = [], 0
    for catalog in _opened(store):
        with Progress(f"looking at {catalog.shown}", None) as bar:
            found += shares(catalog, chosen, lambda: bar.advance(1))
        quarantined += getattr(catalog, "quarantined", 0)
    tiers = None if server is None else _served(server)
    if as_json:
        told: dict[str, Any] = {"shares": [asdict(share) for share in found], "quarantined": quarantined}
        typer.echo(json.dumps(told | ({} if tiers is None else {"tiers": tiers})))
        return
    table = common.table("store", "tier", "model", "tenant", "codec", "records", "tokens", "size", "pinned", left=5)
    for s in found:
        pinned = f"{s.pinned:,} ({common.human_size(s.pinned_bytes)})" if s.pinned else ""
        table.add_row(
            *(s.place, s.tier, s.model[:8], s.tenant, s.codec or "?", f"{s.records:,}", f"{s.tokens:,}"),
            *(common.human_size(s.bytes), pinned),
        )
    common.show(table)
    records, size = sum(s.records for s in found), sum(s.bytes for s in found)
    typer.echo(f"{records:,} records, {common.human_size(size)}; {quarantined:,} quarantined")
    for tier, counts in (tiers or {}).items():
        asked = counts["hits"] + counts["misses"]
        rate = f"{100 * counts['hits'] / asked:.1f} % of {asked:,.0f} found" if asked else "nothing asked"
        wrong = ", ".join(f"{n:,.0f} {event}" for event, n in counts.items() if event in WRONG and n)
        read, written = (common.human_size(counts[f"{way}_bytes"]) for way in ("read", "written"))
        typer.echo(f"{tier}: {rate}, {read} read, {written} written" + (f"; {wrong}" if wrong else ""))


WRONG = ("bad", "unreadable", "index_errors", "errors", "timeouts", "skipped")


@app.command()
def verify(
    store: StorePlaces = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take damaged records and leftovers away, and repair the index.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every record in full and check it. The command exits with 1 if one is damaged or can't be read.

    With --repair, damaged records are moved to the folder "quarantine" of a store in a folder, and removed from any other;
    they are then computed again when needed. Leftovers of killed writers are removed. Files that aren't the store's are
    listed, and left alone.

    \b
      kvgraph store verify --store kv
      kvgraph store verify --store s3://bucket/prefix --repair
    """
    clean = True
    for catalog in _opened(store):
        with Progress(f"checking {catalog.shown}", None) as bar:
            report = catalog.verify(repair, lambda: bar.advance(1))
        if as_json:
            typer.echo(json.dumps({"store": catalog.shown, "clean": report.clean} | asdict(report)))
        else:
            _show_report(report)
        clean = clean and report.clean
    if not clean:
        raise typer.Exit(1)


def _show_report(report: VerifyReport) -> None:
    for key, reason in report.bad:
        typer.echo(f"{'moved aside' if report.repaired else 'damaged'} {key}: {reason}")
    for path, reason in report.unreadable:
        typer.echo(f"can't read {path}: {reason}")
    for key, reason in report.unsupported:
        typer.echo(f"left alone {key}: {reason}")
    for key, reason in report.untrusted:
        typer.echo(f"left alone {key}: it {reason}")
    for path in report.foreign:
        typer.echo(f"not the store's: {path}")
    if report.temporary:
        typer.echo(
            f"{'removed ' if report.repaired else ''}{report.temporary:,} leftovers of interrupted writers"
            + ("" if report.repaired else "; --repair removes them")
        )
    if report.rows_added or report.rows_removed:
        typer.echo(f"index repaired: {report.rows_added:,} rows added, {report.rows_removed:,} removed")
    good = f"{report.good:,} records are good ({common.human_size(report.bytes)})"
    if report.clean:
        typer.echo(good)
        return
    advice = "" if report.repaired else "; --repair takes the bad ones away"
    typer.echo(f"{good}; {len(report.bad):,} were bad, {len(report.unreadable):,} can't be read{advice}")


@app.command()
def gc(
    store: StorePlaces = None,
    max_size: MaxSize = None,
    older_than: Older = None,
    tenant_quota: Quota = None,
    model: Model = "",
    tenant: Tenant = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove records that weren't used recently.

    Removes records unused for --older-than, then the least recently used ones of tenants with more than --tenant-quota, then
    those of everybody down to --max-size. Pinned records count, and stay. With several places, each is cleaned by itself.
    Object stores don't know when a record was used, only when it was written.

    \b
      kvgraph store gc --store kv --older-than 7d --max-size 10GiB
      kvgraph store gc --store redis://127.0.0.1:6379/0 --tenant-quota 2GiB --dry-run
    """
    if max_size is None and older_than is None and tenant_quota is None:
        raise typer.BadParameter(
            "say what to remove: --max-size SIZE, --older-than TIME, --tenant-quota SIZE, or several"
        )
    from kvgraph.store.maintenance import garbage

    chosen = _filter(model, tenant)
    for catalog in _opened(store):
        entries = chosen.of(catalog, details=False)
        victims = garbage(entries, time.time(), max_bytes=max_size, older_than=older_than, quota=tenant_quota)
        if not dry_run:
            with Progress(f"removing from {catalog.shown}", len(victims)) as bar:
                victims = catalog.remove(victims, lambda: bar.advance(1))
        size = sum(entry.size for entry in victims)
        if as_json:
            told = {"store": catalog.shown, "removed": len(victims), "bytes": size, "dry_run": dry_run}
            typer.echo(json.dumps(told))
        else:
            would = "would remove" if dry_run else "removed"
            typer.echo(f"{would} {len(victims):,} records ({common.human_size(size)})")


@app.command()
def pin(keys: Keys, store: StorePlaces = None, as_json: Json = False) -> None:
    """Protect records from eviction and from `gc`. Redis evicts by its own rules, which know no pins.

    \b
      kvgraph store pin --store kv 3f9a01c2
    """
    _set_pinned(store, keys, True, as_json)


@app.command()
def unpin(keys: Keys, store: StorePlaces = None, as_json: Json = False) -> None:
    """Undo `pin`.

    \b
      kvgraph store unpin --store kv 3f9a01c2
    """
    _set_pinned(store, keys, False, as_json)


def _set_pinned(store: list[str] | None, keys: Sequence[str], pinned: bool, as_json: bool) -> None:
    did = "pinned" if pinned else "unpinned"
    for catalog in _opened(store):
        for entry in _found(catalog, keys):
            catalog.set_pinned(entry, pinned)
            typer.echo(json.dumps({"store": catalog.shown, did: entry.key}) if as_json else f"{did} {entry.key}")


@app.command()
def rm(
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Keys, or their first digits.")] = None,
    store: StorePlaces = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every record.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all: don't ask.")] = False,
    model: Model = "",
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Remove records by key, or all of them, pinned or not. They are computed again when they are needed.

    \b
      kvgraph store rm --store kv 3f9a01c2
      kvgraph store rm --store kv --all --tenant support
    """
    if everything == bool(keys):
        raise typer.BadParameter("give KEYs to remove, or --all")
    chosen = _filter(model, tenant)
    for catalog in _opened(store):
        entries = chosen.of(catalog, details=False) if everything else _found(catalog, keys or ())
        size = sum(entry.size for entry in entries)
        what = f"all {len(entries):,} records ({common.human_size(size)}) of {catalog.shown}"
        if everything and not yes and not typer.confirm(f"Remove {what}?"):
            raise StoreError("nothing was removed")
        with Progress(f"removing from {catalog.shown}", len(entries)) as bar:
            for entry in entries:
                if entry.pinned:
                    catalog.set_pinned(entry, False)
            removed = catalog.remove(entries, lambda: bar.advance(1))
        if as_json:
            typer.echo(json.dumps({"store": catalog.shown, "removed": len(removed), "bytes": size}))
        elif everything:
            typer.echo(f"removed {len(removed):,} records ({common.human_size(size)})")
        else:
            for entry in removed:
                typer.echo(f"removed {entry.key}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    store: StorePlaces = None,
    model: Model = "",
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Write records into one file, which `kvgraph store import` loads on another machine.

    The file is a tar archive of the records as they are; each is checked before it is written.

    \b
      kvgraph store export corpus.kvgraph --store kv --model 3f9a01c2
    """
    from kvgraph.store import archive

    catalog = _one(store)
    entries = _listed(catalog, _filter(model, tenant))
    if not entries:
        raise StoreError(f"there are no such records in {catalog.shown}")
    with Progress("exporting", len(entries)) as bar:
        done = archive.export(catalog, entries, file, lambda: bar.advance(1))
    _show_moved("exported", done, file, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `kvgraph store export` wrote.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The model that will read the records: its folder or hub name, or the first 8 or more digits of its "
            "fingerprint.",
        ),
    ],
    store: StorePlaces = None,
    adapter: common.Adapter = None,
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    as_json: Json = False,
) -> None:
    """Load a file's records into a store. It is refused if they were computed by another model.

    Every record is checked in full. Records that are there already stay.

    \b
      kvgraph store import corpus.kvgraph --store kv --model ./llama
    """
    from kvgraph.store import archive
    from kvgraph.store.open import open_catalog

    places = _places(store)
    if len(places) != 1:
        raise typer.BadParameter("give one --store PLACE to import into")
    records = archive.count(file)
    fingerprint = model
    if re.fullmatch("[0-9a-f]{8,64}", model) is None:
        fingerprint = common.load_model(model, dtype, "cpu", False, adapter, quantize).fingerprint
    catalog = open_catalog(places[0], make=True)
    with Progress("importing", records) as bar:
        done = archive.import_(file, catalog, fingerprint, lambda: bar.advance(1))
    _show_moved("imported", done, catalog.shown, as_json)


@app.command()
def migrate(
    to: Annotated[str, typer.Option("--to", metavar="PLACE", help="Where the records go: a folder, or a URL.")] = "",
    store: StorePlaces = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="How they are kept there, e.g. zstd or kivi+zstd; nothing may get lost [default: as they are]."
        ),
    ] = None,
    move: Annotated[bool, typer.Option("--move", help="Remove them where they were, but for pinned ones.")] = False,
    model: Model = "",
    tenant: Tenant = None,
    as_json: Json = False,
) -> None:
    """Take records to another place, or keep them in another way.

    Without --to, the records stay where they are, and are kept with --codec from now on. zstd can come and go. A codec that
    loses something makes other records, with other keys: encode the documents again.

    \b
      kvgraph store migrate --store kv --to s3://bucket/prefix
      kvgraph store migrate --store kv --codec zstd
    """
    if not to and codec is None:
        raise typer.BadParameter("say where to: --to PLACE, or how records are to be kept: --codec CODEC")
    from kvgraph.store.codecs.registry import parse
    from kvgraph.store.maintenance import migrate as taken
    from kvgraph.store.open import open_catalog

    common.without_passwords([to])
    if to and _place(to) in map(_place, _places(store)):  # --move would remove what it has just found there
        raise typer.BadParameter(f"--to {to} is the store itself; leave --to out to keep its records with --codec")
    chosen, packing = _filter(model, tenant), None if codec is None else parse(codec)
    source = _one(store)
    target = open_catalog(to, make=True) if to else source
    entries = _listed(source, chosen)
    with Progress(f"migrating to {target.shown}", len(entries)) as bar:
        done = taken(source, target, entries, packing, move, lambda: bar.advance(1))
    _show_moved("migrated", done, target.shown, as_json)


def _show_moved(did: str, done: Moved, where: object, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(done)))
    else:
        for name, reason in done.refused:
            typer.echo(f"left out {name}: {reason}")
        there = f"; {done.there:,} were there already" if done.there else ""
        typer.echo(f"{did} {done.records:,} records ({common.human_size(done.bytes)}) to {where}{there}")
    if done.refused:
        raise typer.Exit(1)


# -- places and records -----------------------------------------------------------------------------------------------


def _places(store: list[str] | None) -> list[str]:
    if not store:
        raise typer.BadParameter(f"which store? give --store PLACE, or set {common.VARIABLE}")
    return store


def _place(text: str) -> str:
    """A place, the same however its folder is written."""
    return text if StorePlace(text).is_url else str(Path(text).resolve())


def _opened(store: list[str] | None) -> Iterator[Catalog]:
    """The stores, which must exist, one after the other; each is closed before the next."""
    from kvgraph.store.open import open_catalog

    for place in _places(store):
        with _closing(open_catalog(place)) as catalog:
            yield catalog


def _one(store: list[str] | None) -> Catalog:
    from kvgraph.store.open import open_catalog

    places = _places(store)
    if len(places) > 1:
        raise typer.BadParameter("give one --store PLACE to take records from")
    return open_catalog(places[0])


@contextmanager
def _closing(catalog: Catalog) -> Iterator[Catalog]:
    try:
        yield catalog
    finally:
        catalog.close()


def _filter(model: str, tenant: str | None) -> RecordFilter:
    from kvgraph.store.maintenance import RecordFilter

    if re.fullmatch("[0-9a-f]{0,64}", model) is None:
        raise typer.BadParameter(f"{model[:40]!r} isn't the beginning of a fingerprint, which has hex digits")
    return RecordFilter(model, tenant)


def _listed(catalog: Catalog, chosen: RecordFilter) -> list[Entry]:
    with Progress(f"looking at {catalog.shown}", None) as bar:
        return chosen.of(catalog, seen=lambda: bar.advance(1))


def _found(catalog: Catalog, keys: Iterable[str]) -> list[Entry]:
    from kvgraph.store.maintenance import find

    entries = list(catalog.entries(details=False))
    return [find(catalog, key, entries) for key in keys]


def _served(url: str) -> dict[str, dict[str, float]]:
    """A server's counts by tier and event, from its metrics."""
    from urllib.request import urlopen

    address = f"{url.rstrip('/')}/metrics"
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("give an address such as http://127.0.0.1:8771")
        with urlopen(address, timeout=10) as answer:
            text = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        raise StoreError(f"{address} can't be read: {error}") from None
    tiers: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = re.fullmatch(
            r'kvgraph_store_(\w+)_total\{(?:replica="[^"]*",)?tier="([\w-]+)"(?:,replica="[^"]*")?\} (\S+)', line
        )
        if match is not None:
            counts = tiers.setdefault(match[2], {})
            counts[match[1]] = counts.get(match[1], 0.0) + float(match[3])  # of all replicas
    if not tiers:
        raise StoreError(f"{address} says nothing about a store; the server has none, or isn't kvgraph's")
    return tiers
