"""`kvgraph index`: a folder of documents as a graph that a server can answer from."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.cli.common import Adapter, AllowUntested, Device, Dtype, Json, KVBudget, NoCheck, Quantize, counted
from kvgraph.errors import KVGraphError

if TYPE_CHECKING:
    from kvgraph.indexing import Changes, CorpusIndex, Elsewhere, EncodedCorpus, PlannedCorpus

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")  # of a graph, as the server takes it
SAID = 8  # remarks of readers that are shown one by one
BUILD = "build"


class _BuildByDefault(typer.core.TyperGroup):  # type: ignore[misc]
    """`kvgraph index SOURCE ...` means `kvgraph index build SOURCE ...`. A folder called "ls" is written ./ls."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of the command, with the name of the default one where none is given."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [BUILD, *args]
        return super().parse_args(ctx, args)  # type: ignore[no-any-return]


app = typer.Typer(cls=_BuildByDefault, no_args_is_help=True, rich_markup_mode=None)

StoreFolder = Annotated[Path, typer.Option("--store", help="Folder of the store of KV records.")]
IndexName = Annotated[str, typer.Argument(metavar="NAME", help="The index.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub name of a Hugging Face causal LM, or a GGUF file [default: the model of `kvgraph demo`].",
    ),
]


@app.callback()
def index() -> None:
    """Index a folder of documents: read, cut, join by edges, and encode into a store.

    `kvgraph index SOURCE ...` is short for `kvgraph index build SOURCE ...`.

    \b
      kvgraph index ./docs --name docs --store kv
      kvgraph index ls --store kv
    """


@app.command(BUILD)
def build(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Folder or file: Markdown, HTML, text, PDF, records (JSON, JSON Lines, CSV, Parquet), mbox, triples "
            "(TSV, N-Triples, JSON Lines).",
        ),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="What the index, and the graph in the store, is called.")],
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the store of KV records; not needed with --dry-run.")
    ] = None,
    model: Model = None,
    graph: Annotated[
        str,
        typer.Option(
            help="Who reads whom: builders joined by a plus sign, each with fields after a colon: "
            "structure+links:k=4. There are structure, links, citations, mentions, neighbours, triples, listed, shape; "
            "none makes no edges."
        ),
    ] = "structure+links",
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Maximum tokens of a chunk with its title.")] = 256,
    method: Annotated[
        str, typer.Option(help="A method that reads edges and encodes a part as in the whole.")
    ] = "graph-kv",
    embedder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Find chunks by meaning too, with this sentence-transformers model, such as "
            "sentence-transformers/all-MiniLM-L6-v2 [default: by words alone].",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print chunks, tokens, bytes and time.")] = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Encode on a Ray cluster, as `kvgraph encode` does.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on the cluster, each with the model.")] = 2,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each of them.")] = 0,
) -> None:
    """Index documents: read and cut them, join the chunks by edges, and encode every version into the store.

    Run it again after a change: only chunks that changed, and those that read them, are encoded again, and what is gone
    is forgotten. It can be stopped at any time; the same command continues. Then `kvgraph serve` on the same store
    answers from the graph NAME. docs/reference/indexing.md describes formats and builders.

    \b
      kvgraph index ./docs --name docs --store kv --dry-run
      kvgraph index ./docs --name docs --store kv
      kvgraph index build ./papers --name papers --store kv --graph structure+citations:k=4
    """
    if not NAME.fullmatch(name):
        raise typer.BadParameter(
            f"--name {name[:40]!r} may have letters, digits and _ . : -, and not begin with a sign"
        )
    if store is None and not dry_run:
        raise typer.BadParameter("index needs --store FOLDER (or --dry-run)")
    from kvgraph.data import graphs

    builders, chosen = graphs.parse(graph), methods.parse(method)
    if not source.exists():
        raise KVGraphError(f"there is no file or folder {source}")
    from kvgraph.engine.engine import Engine
    from kvgraph.indexing import CorpusIndex, Layout, PlannedCorpus

    loading: dict[str, Any] = {
        "model": model or _default_model(),
        "adapter": adapter,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "allow_untested": allow_untested,
        "check": not no_check,
        "kv_budget": kv_budget,
    }
    elsewhere = None
    if ray is not None:
        from kvgraph.cluster.encoding import encode_levels

        elsewhere = partial(encode_levels, ray, [str(store)], loading, workers, gpus_per_worker)
    engine = Engine.load(**loading, store=None if dry_run else store)
    with engine:
        remarks: list[str] = []
        corpus = PlannedCorpus(engine, source, Layout(builders, chunk_tokens, chosen), remarks.append)
        _show_remarks(remarks)
        typer.echo(_described(corpus))
        there = None if store is None or (dry_run and not store.is_dir()) else CorpusIndex(store, engine, name)
        try:
            if there is not None and there.graph is not None:
                typer.echo(_compared(there.compare(corpus)))
            if dry_run:
                _estimate(engine, corpus, there)
                return
            assert there is not None
            done = _written(there, corpus, source, embedder, elsewhere)
        finally:
            if there is not None:
                there.close()
    typer.echo(
        f"{done.chunks:,} of {counted(len(corpus.table), 'chunk')} encoded: {counted(done.computed, 'token')} computed, "
        f"{done.reused:,} reused, {common.human_size(engine.stored_bytes + done.stored)} written, "
        f"{counted(done.forgotten, 'record')} forgotten, "
        f"{done.computed / max(done.seconds, 1e-9):,.0f} tokens/s"
    )
    served = f"kvgraph serve --model {loading['model']} --store {store}"
    typer.echo(f'{name} is ready; ask it: kvgraph ask --index {name} --store {store} "..."; serve it: {served}')


def _default_model() -> str:
    from kvgraph import demo

    return str(demo.adapter())


def _show_remarks(remarks: list[str]) -> None:
    for line in remarks[:SAID]:
        typer.echo(line, err=True)
    if len(remarks) > SAID:
        typer.echo(f"and {len(remarks) - SAID:,} more like these", err=True)


def _described(corpus: PlannedCorpus) -> str:
    degrees = Counter(reader for _, reader in corpus.edges)
    most = max(degrees.values(), default=0)
    tokens = sum(len(segment.tokens) for segment in corpus.segments)
    return (
        f"{counted(corpus.pages, 'page')}, {counted(len(corpus.table), 'chunk')}, {counted(tokens, 'token')}; "
        f"{counted(len(corpus.edges), 'edge')}, {len(corpus.edges) / len(corpus.table):.1f} sources a chunk on average, "
        f"{most} at most"
    )


def _compared(changes: Changes) -> str:
    if not changes.new and not changes.gone and not changes.readers:
        return "nothing changed since it was indexed"
    return (
        f"changed since it was indexed: {counted(len(changes.pages), 'page')}, with {counted(changes.new, 'new chunk')} and "
        f"{changes.gone:,} gone; unchanged, but reading something else now: {changes.readers:,}; as before: {changes.same:,}"
    )


def _written(
    there: CorpusIndex, corpus: PlannedCorpus, source: Path, embedder: str | None, elsewhere: Elsewhere | None
) -> EncodedCorpus:
    from kvgraph.models.embedder import SentenceEmbedder

    try:
        model = None if embedder is None else SentenceEmbedder(embedder)
        return there.write(corpus, str(source.resolve()), embedder=model, elsewhere=elsewhere)
    except KeyboardInterrupt:
        typer.echo("stopped; finished chunks are in the store; run the same command again to continue", err=True)
        raise


def _estimate(engine: Any, corpus: PlannedCorpus, there: CorpusIndex | None) -> None:
    """Print the cost of encoding all versions that aren't stored."""
    from kvgraph.indexing import rate
    from kvgraph.store.open import open_store

    versions = corpus.versions.tokens
    if there is not None and (there.folder / "VERSION").exists():
        store = open_store(there.folder, engine.fingerprint)
        versions = {key: size for key, size in versions.items() if not store.contains(key)}
        store.close()
    tokens, speed = sum(versions.values()), rate(engine, corpus)
    typer.echo(f"versions    {len(versions):,} to encode")
    typer.echo(f"tokens      {tokens:,}")
    typer.echo(f"KV on disk  {common.human_size(tokens * engine.model.kv_bytes_per_token)}")
    if speed and tokens:
        typer.echo(f"time        about {common.human_time(tokens / speed)} at {speed:,.0f} tokens/s, without writing")
    typer.echo("nothing was written")


@app.command()
def ls(store: StoreFolder, as_json: Json = False) -> None:
    """List the indexes of a store.

    \b
      kvgraph index ls --store kv
    """
    from kvgraph import indexing

    found = [indexing.described(store, name) for name in indexing.names(store)]
    if as_json:
        kept = ("name", "source", "model", "layout")
        rows = [{key: one[key] for key in kept} | {"chunks": len(one["chunks"])} for one in found]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"{store} has no index; make one with `kvgraph index SOURCE --name NAME --store {store}`")
        return
    table = common.table("name", "pages", "chunks", "edges", "tokens", "graph", "source")
    for one in found:
        chunks = one["chunks"]
        table.add_row(
            one["name"],
            f"{len({chunk['page'] for chunk in chunks}):,}",
            f"{len(chunks):,}",
            f"{sum(len(chunk['sources']) for chunk in chunks):,}",
            f"{sum(chunk['tokens'] for chunk in chunks):,}",
            one["layout"]["graph"],
            one["source"],
        )
    common.show(table)


@app.command()
def show(
    name: IndexName,
    store: StoreFolder,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the graph as an HTML page that needs no server.")
    ] = None,
) -> None:
    """Print how many sources and readers the chunks of an index have, and draw its graph.

    \b
      kvgraph index show docs --store kv --out docs-graph.html
    """
    from kvgraph import indexing

    found = indexing.described(store, name)
    chunks = found["chunks"]
    sources = [len(chunk["sources"]) for chunk in chunks]
    readers = Counter(source for chunk in chunks for source in chunk["sources"])
    size = [sum(chunks[source]["tokens"] for source in chunk["sources"]) for chunk in chunks]
    made = common.table("", "mean", "median", "90 %", "maximum")
    for label, values in (
        ("tokens of a chunk", [chunk["tokens"] for chunk in chunks]),
        ("sources of a chunk", sources),
        ("tokens that it reads", size),
        ("readers of a chunk", [readers[i] for i in range(len(chunks))]),
    ):
        made.add_row(label, *_spread(values))
    common.show(made)
    alone = sum(not count and not readers[i] for i, count in enumerate(sources))
    typer.echo(f"{sum(not n for n in sources):,} of {len(chunks):,} chunks read nothing; {alone:,} have no edge at all")
    best = [(count, -i) for i, count in readers.items() if count > 1]
    for count, i in sorted(best, reverse=True)[:5]:
        typer.echo(f"read by {count:,}: {chunks[-i]['title']} ({chunks[-i]['page']})")
    if out is not None:
        from kvgraph.cli.graph_page import page

        out.write_text(page(found), encoding="utf-8")
        typer.echo(f"drawn in {out}")


def _spread(values: list[int]) -> list[str]:
    ordered = sorted(values)
    count = len(ordered)
    picked = (ordered[count // 2], ordered[min(count - 1, count * 9 // 10)], ordered[-1])
    return [f"{sum(ordered) / count:,.1f}", *(f"{value:,}" for value in picked)]


@app.command()
def rm(
    name: IndexName,
    store: StoreFolder,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="[default: the model that the index was made with]")
    ] = None,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Forget an index: its graph, its chunks that no other graph has, and their records.

    \b
      kvgraph index rm docs --store kv
    """
    from kvgraph import indexing

    found = indexing.described(store, name)
    if not yes and not typer.confirm(f"Forget {name} ({counted(len(found['chunks']), 'chunk')}) of {store}?"):
        raise KVGraphError("nothing was removed")
    from kvgraph.engine.engine import Engine

    started = time.perf_counter()
    loading: dict[str, Any] = {"adapter": adapter, "dtype": dtype, "quantize": quantize, "allow_untested": True}
    with Engine.load(model or found["model"], **loading, check=False, store=store) as engine:
        if engine.model.fingerprint != found["fingerprint"]:
            raise KVGraphError(
                f"{name} was made with the model {found['model']}; give it with --model, and its --adapter, --dtype and "
                "--quantize"
            )
        there = indexing.CorpusIndex(store, engine, name)
        try:
            records = there.remove()
        finally:
            there.close()
    typer.echo(f"removed {name}: {counted(records, 'record')}, in {common.human_time(time.perf_counter() - started)}")
