"""What commands share: options, the syntax of values on the command line, and opening an engine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph import units
from kvgraph.data import corpus
from kvgraph.edges import named_edges
from kvgraph.graph import ContextGraph, Text
from kvgraph.places import VARIABLE, StorePlace, places_of
from kvgraph.units import human_size as human_size

if TYPE_CHECKING:
    from rich.table import Table

    from kvgraph.models import Model

DIGITS = re.compile(r"[0-9]{1,18}")  # a number; the limit is ample, and Python refuses thousands of digits
DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Bytes of a size, see `kvgraph.units`."""
    try:
        return units.parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_duration(text: str) -> float:
    """Seconds of "7d", "12h", "30m", "90s" or "2w"."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,18})?)\s*([smhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text[:40]!r} isn't a duration; write for example 7d, 12h or 30m")
    return float(match[1]) * DURATIONS[match[2]]


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub name of a Hugging Face causal LM, or a GGUF file.")
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="A LoRA adapter in PEFT's format, to merge into the model while loading."),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="BITS", help="int8 or int4: quantise the model's matrices, on a CPU. Records have keys of their own."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
KVBudget = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="KV held in memory at once [default: half of the free memory]."
    ),
]
HostBudget = Annotated[
    int | None,
    typer.Option(
        parser=parse_size, metavar="SIZE", help="Pinned host memory of a GPU for copies of KV [default: none]."
    ),
]
AllowUntested = Annotated[
    bool, typer.Option("--allow-untested", help="Accept model types that kvgraph isn't tested on.")
]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Skip the exactness gate (`kvgraph check`) while loading.")]


def without_passwords(places: list[str] | None) -> list[str] | None:
    """Places as they were given. A password among the words of a command is refused: `ps` shows it to everybody."""
    for place in map(StorePlace, places or ()):
        if place.has_password:
            raise typer.BadParameter(
                f"everybody on this machine can read the password in the URL of {place}; put the URL into the variable "
                f"{VARIABLE}, or a Redis password into KVGRAPH_REDIS_PASSWORD"
            )
    return places


def library_without_password(place: str | None) -> str | None:
    """The same for the place of segments and graphs."""
    if place is not None and StorePlace(place).has_password:
        raise typer.BadParameter(
            f"everybody on this machine can read the password in the URL of {StorePlace(place)}; put the URL into the variable "
            "KVGRAPH_LIBRARY"
        )
    return place


def _given_or_set(places: list[str] | None) -> list[str] | None:
    """Places as they were given, or of the environment."""
    return without_passwords(places) or places_of(os.environ.get(VARIABLE, "")) or None


_STORE_HELP = (
    "Folder or URL (redis://HOST/0, s3://BUCKET/PREFIX, gs://, az://) of the store of KV records; repeated, they are tiers "
    f"from fastest to slowest [default: the variable {VARIABLE}]."
)
StorePlaces = Annotated[
    list[str] | None, typer.Option("--store", metavar="PLACE", help=_STORE_HELP, callback=_given_or_set)
]
ServedPlaces = Annotated[  # a server's settings read the environment themselves
    list[str] | None, typer.Option("--store", metavar="PLACE", help=_STORE_HELP, callback=without_passwords)
]
CodecName = Annotated[
    str,
    typer.Option(
        "--codec",
        help="How records are kept: raw, fp8, int8, kivi, gear, with fields after a colon (kivi:bits=2); +zstd compresses. "
        "All but raw and zstd change answers a little.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="full, block, kvlink, graph-kv, ... or a preset. Fields follow a colon: graph-kv:rounds=2,layout=tight "
        "[default: the first that the model declares tuning for, else full].",
    ),
]
Edges = Annotated[
    str,
    typer.Option(
        help="Who reads whom (graph-kv): all, top-k:3, last-k:3 (each also with +self), chain, layers:1-3, star:0, or "
        "source>reader pairs by number or id: '0>2,1>2'."
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"How to write a document from its fields [default: '{title}\n{text}\n' for records, '{text}' for files]."
    ),
]
Prefix = Annotated[str, typer.Option(help="Text before the documents: system prompt, special tokens such as BOS.")]
Documents = Annotated[Path, typer.Option("--documents", metavar="CORPUS", help="JSON Lines, text file or folder.")]
Pick = Annotated[
    list[str] | None,
    typer.Option(
        help="Documents to use, in this order, by id or by number from 0; separated by commas, or repeat it "
        "[default: all]."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def unescaped(text: str) -> str:
    r"""Text with \n, \t and \\ replaced, because they are hard to type in a shell."""
    return re.sub(r"\\([nt\\])", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m[1]], text)


def graph_of(
    documents: Sequence[corpus.CorpusDocument],
    query: Text = "",
    prefix: Text = "",
    edges: str = "",
    piece: Callable[[str], Text] = str,
) -> ContextGraph:
    """The graph of documents. Segments are named by their ids when these are unique. piece: text to segment."""
    ids = [d.name for d in documents]
    names = ids if all(ids) and len(set(ids)) == len(ids) else None
    pieces = [piece(d.text) for d in documents]
    return ContextGraph(pieces, query, prefix, named_edges(edges, names or [""] * len(pieces)), names)


def chosen(
    path: Path, template: str | None, pick: list[str] | None, token_ids: bool = False
) -> list[corpus.CorpusDocument]:
    """Documents of a corpus, all or the picked ones. token_ids: they are token ids, as text or as lists."""
    documents = corpus.load(path, None if template is None else unescaped(template), token_ids=token_ids)
    wanted = [ref.strip() for item in pick or () for ref in item.split(",") if ref.strip()]
    if pick and not wanted:
        raise typer.BadParameter("--pick doesn't name a document; leave it out to use all of them")
    return corpus.pick(documents, wanted) if pick else documents


def load_model(
    model: str,
    dtype: str,
    device: str,
    allow_untested: bool,
    adapter: str | None = None,
    quantize: str | None = None,
) -> Model:
    """Load a model. The imports that this needs take seconds, so they happen here."""
    from kvgraph import models

    return models.load(
        model, adapter=adapter, dtype=dtype, quantize=quantize, device=device, allow_untested=allow_untested
    )


def counted(number: int, what: str) -> str:
    """(1, "page") → "1 page", (2_000, "page") → "2,000 pages"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def human_time(seconds: float) -> str:
    """0.0123 → "12.3 ms", 90 → "1.5 min"."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    for unit, size in (("min", 60), ("h", 3600)):
        if seconds < 100 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def reused(tiers: dict[str, int]) -> str:
    """{"disk": 812} → "812 reused (812 disk)"."""
    where = ", ".join(f"{n:,} {tier}" for tier, n in sorted(tiers.items()) if n)
    return f"{sum(tiers.values()):,} reused" + (f" ({where})" if where else "")


def table(*columns: str, left: int = 1) -> Table:
    """An aligned table: the first `left` columns are left-aligned, the others (numbers) right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table as wide as the terminal, or as wide as needed if the output isn't a terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)
    with console.capture() as capture:
        console.print(made)
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")
