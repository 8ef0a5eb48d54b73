"""`kvgraph bench`: how much reuse saves on the user's own model and machine."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, dataclass, field
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
    Json,
    KVBudget,
    ModelName,
    NoCheck,
    Quantize,
    ServedPlaces,
)
from kvgraph.edges import named_edges
from kvgraph.graph import ContextGraph, Edge
from kvgraph.methods import METHODS
from kvgraph.places import StorePlace

if TYPE_CHECKING:
    from kvgraph.engine.result import Usage
    from kvgraph.models import Model

SALT = "kvgraph bench"  # its records are nobody else's


@dataclass(frozen=True)
class _Row:
    """Medians of one method. Times are in seconds, rates in tokens per second. stored_ttft: with --store."""

    method: str
    cold_computed: int
    cold_ttft: float
    warm_computed: int
    warm_reused: int
    warm_ttft: float
    decode_rate: float
    stored_ttft: float | None = None
    stored_from: dict[str, int] = field(default_factory=dict)


def bench(
    model: ModelName,
    documents: Annotated[int, typer.Option(min=1, help="Documents of random tokens.")] = 10,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each document.")] = 400,
    query: Annotated[int, typer.Option(min=1, help="Tokens of the query.")] = 30,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method to measure, with its fields; may be repeated [default: {', '.join(METHODS)}]."),
    ] = None,
    edges: Annotated[str, typer.Option(help="Edges for methods that read them, as in `kvgraph ask`.")] = "top-k:1",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: torch's choice].")] = None,
    store: ServedPlaces = None,
    codec: CodecName = "raw",
    as_json: Json = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
) -> None:
    """Measure how much reuse saves on your own model and machine.

    Shows time to first token, tokens computed and reused, and decoding speed. Cold: nothing is cached. Warm: the same
    documents with another query, so that only the query is computed. Both have everything in memory. Loading the model isn't
    timed. With --store, a third column is of another engine, whose memory is empty and which reads the documents from the
    store. They are a tenant of their own there, and are removed afterwards.

    \b
      kvgraph bench ./llama --documents 10 --length 400
      kvgraph bench ./llama --method block --store redis://127.0.0.1:6379/0 --codec int8
    """
    names = method or list(METHODS)
    chosen = [methods.parse(name) for name in names]
    pairs = named_edges(edges, [""] * documents)
    import torch

    from kvgraph.engine.engine import Engine, load_model
    from kvgraph.progress import Progress

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(
        model,
        adapter=adapter,
        dtype=dtype,
        quantize=quantize,
        device=device,
        allow_untested=allow_untested,
        check=not no_check,
    )
    rows = []
    with Progress("measuring", len(names) * repeats) as bar:
        for name, m in zip(names, chosen, strict=True):
            cold: list[Usage] = []
            warm: list[Usage] = []
            stored: list[Usage] = []
            for i in range(-1, repeats):  # the first round only warms the machine up
                graph = _graph(loaded, documents, length, seed=i, edges=pairs if m.reads_edges else ())

                def opened() -> Engine:
                    return Engine(loaded, store=store, kv_budget=kv_budget, codec=codec, salt=SALT)

                engine = opened()
                for q, usages in ((0, cold), (1, warm), (2, stored))[: 3 if store else 2]:
                    if usages is stored:
                        engine.close()
                        engine = opened()
                    asked = graph.with_query(_ids(loaded, query, random.Random(f"{i} {q}")))
                    usage = engine.generate(asked, m, max_tokens=new_tokens, ignore_eos=True).usage
                    if i >= 0:
                        usages.append(usage)
                plan = engine.plan(graph.with_query([0]), m, probe=False)
                engine.forget(key for key in engine.keys(plan) if key is not None)
                engine.close()
                if i >= 0:
                    bar.advance(1)
            rows.append(_row(name, cold, warm, stored))
    if as_json:
        settings: dict[str, object] = {
            "documents": documents,
            "length": length,
            "query": query,
            "new_tokens": new_tokens,
            "repeats": repeats,
        }
        settings |= {
            "model": loaded.name,
            "store": [str(StorePlace(place)) for place in store or ()],
            "codec": codec,
            "dtype": str(loaded.dtype),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        typer.echo(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}))
        return
    typer.echo(f"{loaded.name}, {documents} documents × {length} tokens, query {query}, medians of {repeats}")
    last = ["TTFT stored", "from"] if store else []
    table = common.table(
        "method", "computed cold", "TTFT cold", "computed warm", "reused", "TTFT warm", "faster", "decode", *last
    )
    for row in rows:
        table.add_row(
            row.method,
            f"{row.cold_computed:,}",
            common.human_time(row.cold_ttft),
            f"{row.warm_computed:,}",
            f"{row.warm_reused:,}",
            common.human_time(row.warm_ttft),
            f"{row.cold_ttft / row.warm_ttft:,.1f}×",
            f"{row.decode_rate:,.1f} tokens/s",
            *([] if row.stored_ttft is None else [common.human_time(row.stored_ttft), ", ".join(row.stored_from)]),
        )
    common.show(table)


def _graph(model: Model, documents: int, length: int, *, seed: int, edges: tuple[Edge, ...]) -> ContextGraph:
    draw = random.Random(seed)
    return ContextGraph([_ids(model, length, draw) for _ in range(documents)], edges=edges)


def _ids(model: Model, count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(model.vocab_size) for _ in range(count)]


def _row(method: str, cold: list[Usage], warm: list[Usage], stored: list[Usage]) -> _Row:
    return _Row(
        method,
        cold[0].computed_tokens,
        statistics.median(u.ttft for u in cold),
        warm[0].computed_tokens,
        sum(warm[0].reused_tokens.values()),
        statistics.median(u.ttft for u in warm),
        statistics.median((u.completion_tokens - 1) / u.decode for u in cold + warm),
        statistics.median(u.ttft for u in stored) if stored else None,
        stored[0].reused_tokens if stored else {},
    )
