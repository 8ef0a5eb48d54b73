"""`kvgraph encode`: a corpus into a store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Quantize,
    StorePlaces,
    Template,
)
from kvgraph.data import corpus
from kvgraph.errors import KVGraphError
from kvgraph.plan import Plan

if TYPE_CHECKING:
    from kvgraph.encoding import Documents, Done
    from kvgraph.engine.engine import Engine

SAMPLE = 16  # documents timed for the estimate of --dry-run
NAMED = 5  # skipped documents that are named; more are counted


def encode(
    model: ModelName,
    documents: Annotated[Path, typer.Argument(metavar="CORPUS", help="JSON Lines (also .gz), text file, or folder.")],
    store: StorePlaces = None,
    method: MethodName = None,
    template: Template = None,
    prefix: Prefix = "",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    codec: CodecName = "raw",
    limit: Annotated[int | None, typer.Option(min=1, help="Encode only the first documents.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print tokens, bytes and time.")] = False,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Encode on a Ray cluster: auto, ray://HOST:10001, or local to start one here."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on the cluster, each with the model.")] = 2,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each of them.")] = 0,
) -> None:
    """Encode every document of a corpus into a store, once.

    Each document is encoded as the method does before documents read each other. Therefore block, kvlink and graph-kv
    share the records. With full, a document is encoded after the prefix. You can stop at any time: the same command
    continues where it stopped, and documents that are already stored cost nothing.

    \b
      kvgraph encode ./llama corpus.jsonl --method block --store kv --dry-run
      kvgraph encode ./llama corpus.jsonl --method block --store kv --template '{title}\\n{text}\\n'
      kvgraph encode ./llama corpus.jsonl --method block --store kv --ray local --workers 2
    """
    if not store and not dry_run:
        raise typer.BadParameter("encode needs --store PLACE (or --dry-run)")
    chosen = None if method is None else methods.parse(method)
    found = corpus.load(documents, None if template is None else common.unescaped(template), limit)
    prefix = common.unescaped(prefix)
    loading: dict[str, Any] = {
        "model": model,
        "adapter": adapter,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "allow_untested": allow_untested,
        "check": not no_check,
        "kv_budget": kv_budget,
        "codec": codec,
    }
    from kvgraph.encoding import Documents, Done

    items = Documents(chosen, prefix)
    if dry_run:
        from kvgraph.engine.engine import Engine

        return _estimate(Engine.load(**loading), found, items, store or [])
    done, started = Done(), time.perf_counter()
    places = store or []
    try:
        if ray is None:
            _encode(found, items, places, loading, done)
        else:
            from kvgraph.cluster.encoding import encode_on

            encode_on(ray, items, found, places, loading, done, workers, gpus_per_worker)
    except KeyboardInterrupt:
        typer.echo("stopped; finished documents are in the store; run the same command again to continue", err=True)
        raise
    _report_skipped(done)
    typer.echo(
        f"{common.counted(len(found) - len(done.skipped), 'document')}: {done.computed:,} tokens computed, {done.reused:,} reused, "
        f"{common.human_size(done.stored)} written, {done.computed / (time.perf_counter() - started):,.0f} tokens/s"
    )
    if done.too_long:
        raise KVGraphError(
            f"{common.counted(done.too_long, 'document')} can't fit; split what is too long, or raise --kv-budget"
        )


def _encode(
    documents: Sequence[corpus.CorpusDocument],
    items: Documents,
    store: Sequence[str],
    loading: dict[str, Any],
    done: Done,
) -> None:
    from kvgraph.encoding import Encoder, batches
    from kvgraph.progress import Progress

    with Encoder(items, store, **loading) as encoder, Progress("encoding", len(documents)) as bar:
        for batch in batches(documents):
            done.add(encoder.encode(batch))
            bar.advance(len(batch), tokens=done.computed)
        done.stored += encoder.flush()


def _estimate(
    engine: Engine, documents: Sequence[corpus.CorpusDocument], items: Documents, store: Sequence[str]
) -> None:
    """Print the cost of encoding: counted tokens and bytes, and the time extrapolated from a few documents."""
    from kvgraph.encoding import Done

    done = Done()
    plans = [plan for d in documents if (plan := items.plan(engine, d, done)) is not None]
    spans = {
        key: len(span)
        for plan in plans
        for key, span in zip(engine.keys(plan), plan.spans, strict=True)
        if key is not None
    }
    tokens = sum(spans.values())
    _report_skipped(done)
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


def _report_skipped(done: Done) -> None:
    for line in done.skipped[:NAMED]:
        typer.echo(f"skipped {line}", err=True)
    if len(done.skipped) > NAMED:
        typer.echo(f"skipped {len(done.skipped) - NAMED:,} more documents", err=True)
