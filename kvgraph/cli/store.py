"""`kvgraph store ...`: inspect and maintain a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph.cli import common
from kvgraph.errors import StoreError

if TYPE_CHECKING:
    from kvgraph.store.disk import DiskStore

Folder = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
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

Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or their first digits.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def store() -> None:
    """Inspect and maintain a store of KV records.

    \b
      kvgraph store stat --store kv
      kvgraph store prune --store kv --max-size 10GiB
    """


@app.command()
def ls(
    folder: Folder,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of records to show.")] = 50,
) -> None:
    """List records, the most recently used first.

    \b
      kvgraph store ls --store kv --limit 10
    """
    entries = _opened(folder).ls()
    table = common.table("key", "tokens", "size", "last used", "model", "pinned", "codec")
    now = time.time()
    for e in entries[:limit]:
        size, used = common.human_size(e.size), f"{common.human_time(max(0.0, now - e.used))} ago"
        table.add_row(e.key[:16], f"{e.tokens:,}", size, used, e.fingerprint[:8], "yes" if e.pinned else "", e.codec)
    common.show(table)
    if len(entries) > limit:
        typer.echo(f"... and {len(entries) - limit:,} more; see --limit")


@app.command()
def stat(folder: Folder) -> None:
    """Print how many records, tokens and bytes a store holds.

    \b
      kvgraph store stat --store kv
    """
    found = _opened(folder).stat()
    typer.echo(f"records      {found.records:,}")
    typer.echo(f"tokens       {found.tokens:,}")
    typer.echo(f"size         {common.human_size(found.bytes)}")
    typer.echo(f"pinned       {found.pinned:,} ({common.human_size(found.pinned_bytes)})")
    typer.echo(f"quarantined  {found.quarantined:,}")


@app.command()
def verify(folder: Folder) -> None:
    """Read every record in full and check it.

    Damaged records are moved to the store's folder "quarantine"; they are then computed again when needed. The command
    exits with 1 if there were any. Leftovers of killed writers are removed. Files that aren't the store's are listed.

    \b
      kvgraph store verify --store kv
    """
    report = _opened(folder).verify()
    for key, reason in report.bad:
        typer.echo(f"moved aside {key}: {reason}")
    for path, reason in report.unreadable:
        typer.echo(f"can't read {path}: {reason}")
    for key, reason in report.unsupported:
        typer.echo(f"left alone {key}: {reason}")
    for key, reason in report.untrusted:
        typer.echo(f"left alone {key}: it {reason}")
    for path in report.foreign:
        typer.echo(f"not the store's: {path}")
    if report.temporary:
        typer.echo(f"removed {report.temporary:,} leftovers of interrupted writers")
    if report.rows_added or report.rows_removed:
        typer.echo(f"index repaired: {report.rows_added:,} rows added, {report.rows_removed:,} removed")
    good = f"{report.good:,} records are good ({common.human_size(report.bytes)})"
    if report.clean:
        typer.echo(good)
        return
    typer.echo(f"{good}; {len(report.bad):,} were bad, {len(report.unreadable):,} can't be read")
    raise typer.Exit(1)


@app.command()
def prune(folder: Folder, max_size: MaxSize = None, older_than: Older = None) -> None:
    """Remove records that weren't used recently.

    Removes records unused for --older-than, then the least recently used ones down to --max-size. Pinned records stay.

    \b
      kvgraph store prune --store kv --older-than 7d --max-size 10GiB
    """
    if max_size is None and older_than is None:
        raise typer.BadParameter("say what to remove: --max-size SIZE, --older-than TIME, or both")
    removed, size = _opened(folder).prune(max_size, older_than)
    typer.echo(f"removed {removed:,} records ({common.human_size(size)})")


@app.command()
def pin(folder: Folder, keys: Keys) -> None:
    """Protect records from eviction and from `prune`.

    \b
      kvgraph store pin --store kv 3f9a01c2
    """
    opened = _opened(folder)
    for key in map(opened.find, keys):
        opened.pin(key)
        typer.echo(f"pinned {key}")


@app.command()
def unpin(folder: Folder, keys: Keys) -> None:
    """Undo `pin`.

    \b
      kvgraph store unpin --store kv 3f9a01c2
    """
    opened = _opened(folder)
    for key in map(opened.find, keys):
        opened.unpin(key)
        typer.echo(f"unpinned {key}")


@app.command()
def rm(
    folder: Folder,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Keys, or their first digits.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every record.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all: don't ask.")] = False,
) -> None:
    """Remove records by key, or all of them. Removed records are computed again when they are needed.

    \b
      kvgraph store rm --store kv 3f9a01c2
      kvgraph store rm --store kv --all
    """
    if everything == bool(keys):
        raise typer.BadParameter("give KEYs to remove, or --all")
    opened = _opened(folder)
    for key in keys or ():
        typer.echo(f"removed {opened.rm(key)}")
    if not everything:
        return
    entries = opened.ls()
    size = common.human_size(sum(e.size for e in entries))
    if not yes and not typer.confirm(f"Remove all {len(entries):,} records ({size}) of {folder}?"):
        raise StoreError("nothing was removed")
    removed = sum(opened.delete(e.key) for e in entries)
    typer.echo(f"removed {removed:,} records ({size})")


def _opened(folder: Path) -> DiskStore:
    """The store in a folder, which must exist: inspecting a store must not create one."""
    from kvgraph.store.disk import DiskStore

    if not (folder / "VERSION").exists():
        raise StoreError(f"{folder} isn't a store" if folder.exists() else f"there is no store {folder}")
    return DiskStore(folder)
