"""`kvgraph encode`: a corpus into a store."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.cli.common import (
    Adapter,
    AllowUntested,
    CodecName,
    Device,
    Dtype,
    KVBudget,
    MethodName,
    ModelName,
    NoCheck,
    Prefix,
    StorePlaces,
    Template,
)
from kvgraph.data import corpus
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.request import Request

SAMPLE = 16  # documents timed for the estimate of --dry-run
NAMED = 5  # skipped documents that are named; more are counted


@dataclass
class _Totals:
    """What one run of `encode` did."""

    computed: int = 0  # tokens
    reused: int = 0  # tokens
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)
    too_long: int = 0


def encode(
    model: ModelName,
    documents: Annotated[Path, typer.Argument(metavar="CORPUS", help="JSON Lines (also .gz), text file, or folder.")],
    store: StorePlaces = None,
    method: MethodName = None,
    template: Template = None,
    prefix: Prefix = "",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    codec: CodecName = "raw",
    limit: Annotated[int | None, typer.Option(min=1, help="Encode only the first documents.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print tokens, bytes and time.")] = False,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
) -> None:
    """Encode every document of a corpus into a store, once.

    Each document is encoded as the method does before documents read each other. Therefore block, kvlink and graph-kv
    share the records. With full, a document is encoded after the prefix. You can stop at any time: the same command
    continues where it stopped, and documents that are already stored cost nothing.

    \b
      kvgraph encode ./llama corpus.jsonl --method block --store kv --dry-run
      kvgraph encode ./llama corpus.jsonl --method block --store kv --template '{title}\\n{text}\\n'
    """
    if not store and not dry_run:
        raise typer.BadParameter("encode needs --store PLACE (or --dry-run)")
    chosen = None if method is None else methods.parse(method)
    found = corpus.load(documents, None if template is None else common.unescaped(template), limit)
    where = None if dry_run or not store else store
    from kvgraph.engine.engine import Engine

    engine = Engine.load(
        model,
        adapter=adapter,
        dtype=dtype,
        device=device,
        allow_untested=allow_untested,
        check=not no_check,
        kv_budget=kv_budget,
        store=where,
        codec=codec,
    )
    prefix = common.unescaped(prefix)
    if dry_run:
        return _estimate(engine, found, chosen, prefix, store or [])
    with engine:
        totals = _Totals()
        try:
            with _unlogged("kvgraph.engine"):  # this command reports a record that can't be written itself, once
                _encode(engine, found, chosen, prefix, totals)
        except KeyboardInterrupt:
            typer.echo("stopped; finished documents are in the store; run the same command again to continue", err=True)
            raise
    _report_skipped(totals)
    typer.echo(
        f"{len(found) - len(totals.skipped):,} documents: {totals.computed:,} tokens computed, {totals.reused:,} reused, "
        f"{common.human_size(engine.stored_bytes)} written, {totals.computed / max(totals.seconds, 1e-9):,.0f} tokens/s"
    )
    if totals.too_long:
        raise KVGraphError(f"{totals.too_long} documents don't fit; split them, or raise --kv-budget")


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _encode(
    engine: Engine, documents: Sequence[corpus.CorpusDocument], method: Method | None, prefix: str, totals: _Totals
) -> None:
    from kvgraph.progress import Progress

    started = time.perf_counter()
    with Progress("encoding", len(documents)) as bar:

        def missing() -> Iterator[Request]:
            """Requests for the documents that aren't stored yet."""
            for document in documents:
                plan = _planned(engine, document, method, prefix, totals)
                if plan is not None and not _is_stored(engine, plan):
                    yield engine.prepare(plan, encode_only=True)
                    continue
                totals.reused += 0 if plan is None else _tokens(plan)
                bar.advance(1, tokens=totals.computed)

        with closing(engine.run(missing())) as outcomes:
            for _, result in outcomes:
                if isinstance(result, KVGraphError):
                    raise result
                totals.computed += result.usage.computed_tokens
                totals.reused += sum(result.usage.reused_tokens.values())
                bar.advance(1, tokens=totals.computed)
                if engine.store_error is not None:
                    raise engine.store_error
        engine.flush()
        totals.seconds = time.perf_counter() - started
        if engine.store_error is not None:
            raise engine.store_error


def _planned(
    engine: Engine, document: corpus.CorpusDocument, method: Method | None, prefix: str, totals: _Totals
) -> Plan | None:
    """The plan of a graph with this document alone. One that is empty or too large is added to totals.skipped."""
    # The query changes no document. The name is for errors, because every document is the only one of its graph.
    graph = ContextGraph([document.text], [0], prefix, names=[document.where]).tokenized(engine.tokenize)
    if not graph.segments[0]:
        totals.skipped.append(f"{document.where}: no tokens")
        return None
    plan = engine.plan(graph, method, probe=False)
    budget = engine.scheduler.memory.budget
    need = engine.scheduler.memory.most_bytes(span for span in plan.spans if span.cached)
    if plan.highest_position < engine.model.limit and need <= budget:
        return plan
    totals.too_long += 1
    totals.skipped.append(
        f"{document.where}: {len(graph.segments[0]):,} tokens don't fit the model's {engine.model.limit:,} positions "
        f"or the KV budget of {common.human_size(budget)}"
    )
    return None


def _is_stored(engine: Engine, plan: Plan) -> bool:
    """Whether the store has a file for every span. `kvgraph store verify` and readers check the files."""
    assert engine.store is not None
    return all(engine.store.contains(key) for key in engine.keys(plan) if key is not None)


def _tokens(plan: Plan) -> int:
    return sum(len(span) for span in plan.spans if span.cached)


def _estimate(
    engine: Engine, documents: Sequence[corpus.CorpusDocument], method: Method | None, prefix: str, store: Sequence[str]
) -> None:
    """Print the cost of encoding: counted tokens and bytes, and the time extrapolated from a few documents."""
    totals = _Totals()
    plans = [plan for d in documents if (plan := _planned(engine, d, method, prefix, totals)) is not None]
    spans = {
        key: len(span)
        for plan in plans
        for key, span in zip(engine.keys(plan), plan.spans, strict=True)
        if key is not None
    }
    tokens = sum(spans.values())
    _report_skipped(totals)
    typer.echo(f"documents   {len(plans):,}")
    typer.echo(f"tokens      {tokens:,}")
    first = _rate(engine, plans[:1])  # slower than the rest
    rate = _rate(engine, plans[1 :: max(1, len(plans) // SAMPLE)]) or first
    size = tokens * engine.model.kv_bytes_per_token * _share(engine, spans)
    typer.echo(f"KV on disk  {common.human_size(size)}{_free(store)}")
    if rate:
        typer.echo(f"time        about {common.human_time(tokens / rate)} at {rate:,.0f} tokens/s, without writing")
    typer.echo("nothing was written")


def _rate(engine: Engine, plans: Sequence[Plan]) -> float:
    """Tokens per second when encoding these plans; 0 if there was nothing to encode."""
    started = time.perf_counter()
    outcomes = [result for _, result in engine.run(engine.prepare(plan, encode_only=True) for plan in plans)]
    computed = sum(result.usage.computed_tokens for result in outcomes if not isinstance(result, KVGraphError))
    return computed / (time.perf_counter() - started)


def _share(engine: Engine, keys: Iterable[str]) -> float:
    """What is left of the size of a record that is in memory, once it is packed."""
    from kvgraph.store.codecs.registry import packed, repacked

    for key in keys:
        found = engine.scheduler.memory.pool.get(key)
        if found is not None:
            record, raw = found[0], len(found[0]) * engine.model.kv_bytes_per_token
            kept = packed(record, engine.codec) if record.keys else repacked(record, engine.codec)
            return kept.stored_bytes / raw
    return 1.0


def _free(store: Sequence[str]) -> str:
    """The free space where the store's first folder is or would be."""
    folders = [Path(place).absolute() for place in store if "://" not in place]
    if not folders:
        return ""
    there = next(p for p in (folders[0], *folders[0].parents) if p.exists())
    return f"; {common.human_size(shutil.disk_usage(there).free)} free"


def _report_skipped(totals: _Totals) -> None:
    for line in totals.skipped[:NAMED]:
        typer.echo(f"skipped {line}", err=True)
    if len(totals.skipped) > NAMED:
        typer.echo(f"skipped {len(totals.skipped) - NAMED:,} more documents", err=True)
