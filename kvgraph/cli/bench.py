"""`kvgraph bench`: how much reuse saves on the user's own model and machine."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.cli.common import Adapter, AllowUntested, Device, Dtype, Json, KVBudget, ModelName, NoCheck
from kvgraph.edges import named_edges
from kvgraph.graph import ContextGraph, Edge
from kvgraph.methods import METHODS

if TYPE_CHECKING:
    from kvgraph.engine.result import Usage
    from kvgraph.models import Model


@dataclass(frozen=True)
class _Row:
    """Medians of one method. Times are in seconds, rates in tokens per second."""

    method: str
    cold_computed: int
    cold_ttft: float
    warm_computed: int
    warm_reused: int
    warm_ttft: float
    decode_rate: float


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
    as_json: Json = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
) -> None:
    """Measure how much reuse saves on your own model and machine.

    Shows time to first token, tokens computed and reused, and decoding speed. Cold: nothing is cached. Warm: the same
    documents with another query, so that only the query is computed. Everything is in memory. Loading the model isn't
    timed.

    \b
      kvgraph bench ./llama --documents 10 --length 400
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
        model, adapter=adapter, dtype=dtype, device=device, allow_untested=allow_untested, check=not no_check
    )
    rows = []
    with Progress("measuring", len(names) * repeats) as bar:
        for name, m in zip(names, chosen, strict=True):
            cold: list[Usage] = []
            warm: list[Usage] = []
            for i in range(-1, repeats):  # the first round only warms the machine up
                graph = _graph(loaded, documents, length, seed=i, edges=pairs if m.reads_edges else ())
                engine = Engine(loaded, kv_budget=kv_budget)
                for q, usages in ((0, cold), (1, warm)):
                    asked = graph.with_query(_ids(loaded, query, random.Random(f"{i} {q}")))
                    usage = engine.generate(asked, m, max_tokens=new_tokens, ignore_eos=True).usage
                    if i >= 0:
                        usages.append(usage)
                if i >= 0:
                    bar.advance(1)
            rows.append(_row(name, cold, warm))
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
            "dtype": str(loaded.dtype),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        typer.echo(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}))
        return
    typer.echo(f"{loaded.name}, {documents} documents × {length} tokens, query {query}, medians of {repeats}")
    table = common.table(
        "method", "computed cold", "TTFT cold", "computed warm", "reused", "TTFT warm", "faster", "decode"
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
        )
    common.show(table)


def _graph(model: Model, documents: int, length: int, *, seed: int, edges: tuple[Edge, ...]) -> ContextGraph:
    draw = random.Random(seed)
    return ContextGraph([_ids(model, length, draw) for _ in range(documents)], edges=edges)


def _ids(model: Model, count: int, draw: random.Random) -> list[int]:
    return [draw.randrange(model.vocab_size) for _ in range(count)]


def _row(method: str, cold: list[Usage], warm: list[Usage]) -> _Row:
    return _Row(
        method,
        cold[0].computed_tokens,
        statistics.median(u.ttft for u in cold),
        warm[0].computed_tokens,
        sum(warm[0].reused_tokens.values()),
        statistics.median(u.ttft for u in warm),
        statistics.median((u.completion_tokens - 1) / u.decode for u in cold + warm),
    )
