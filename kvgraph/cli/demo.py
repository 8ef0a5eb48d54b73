"""`kvgraph demo`: the whole thing in a minute, with nothing to download."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method

if TYPE_CHECKING:
    from rich.table import Table

    from kvgraph.engine.result import Result
    from kvgraph.models import Model

PREFIX = "Answer from these documents about the island of Tarn Veley.\n\n"
NEW_TOKENS = 16
TOLERANCE = 1e-4  # largest difference of logits, in standard deviations


def demo() -> None:
    """See encoding, asking, restarting and exactness in a minute.

    It uses documents that come with the package and builds a tiny random model on the spot, so the answers are gibberish; what to look at is what is computed and what
    is reused, how long the first token takes, and that the answers stay the same. Nothing is downloaded or left behind.

    \b
      kvgraph demo
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="kvgraph-demo-") as folder:
        warnings.simplefilter("ignore")  # of course this model isn't tuned for any method
        _run(Path(folder))


def _run(folder: Path) -> None:
    from kvgraph import demo as content

    typer.echo("A tiny random Llama is built on the spot, so its answers are gibberish. What counts is what is")
    typer.echo("computed, what is reused, how long the first token takes, and that the answers stay the same.\n")
    content.write_model(folder)
    model = common.load_model(str(folder), "auto", "cpu", False)
    documents = content.documents()
    graph = common.graph_of(documents, f"\nQuestion: {content.questions()[0]}\nAnswer:", PREFIX)
    cited = ContextGraph(graph.segments, graph.query, graph.prefix, content.citations(), graph.names)
    start = content.token_id("<|link_0|>")
    kvlink = f"kvlink:links={content.LINKS},link_start={start},slots={content.LINK_SLOTS}"
    cases = {name: (methods.parse(name), graph) for name in ("full", "block")}
    cases["kvlink"] = methods.parse(kvlink), graph
    cases["graph-kv"] = methods.parse("graph-kv"), cited

    _encode_once(model, graph, folder / "corpus")
    typer.echo(
        "\n2. The same question by four methods. cold: nothing is stored; warm: asked again; restart: a new\n"
        "   engine on the same disk store. graph-kv encodes a document again after those it cites, so it\n"
        "   computes more when cold.\n"
    )
    table = common.table("method", "", "computed", "of docs", "reused from", "first token", "peak KV", left=2)
    different = [
        name for name, (m, g) in cases.items() if not _ask_three_times(table, model, g, name, m, folder / name)
    ]
    common.show(table)
    _say(not different, "cold, warm and restarted answers are the same tokens, and only cold ones compute documents")

    typer.echo("\n3. Composed from stored KV, the logits are those of one dense forward over the same plan:\n")
    worst = {name: _difference(model, m, g) for name, (m, g) in cases.items()}
    for name, difference in worst.items():
        _say(difference <= TOLERANCE, f"{name:8}  largest difference {difference:.1e} standard deviations")
    typer.echo("\nNext: `kvgraph encode --help`, and `kvgraph check MODEL` for a model of your own.")
    if different or max(worst.values()) > TOLERANCE:
        raise KVGraphError("the demo found a difference: please report it, with the output above")


def _encode_once(model: Model, graph: ContextGraph, folder: Path) -> None:
    from kvgraph.engine.engine import Engine

    typer.echo(
        f"1. The corpus, {len(graph.segments)} documents, is encoded into a store on disk, each document alone.\n"
    )
    with Engine(model, store=folder) as engine:
        done = engine.warm(
            [ContextGraph([text], prefix=graph.prefix) for text in graph.segments], "block", progress=False
        )
    size = common.human_size(sum(f.stat().st_size for f in folder.rglob("*.safetensors")))
    rate = done.computed_tokens / done.seconds
    typer.echo(
        f"   {done.computed_tokens:,} tokens computed in {common.human_time(done.seconds)} ({rate:,.0f} a second), {size}"
    )
    with Engine(model, store=folder) as engine:
        usage = engine.generate(graph, "block", max_tokens=NEW_TOKENS, ignore_eos=True).usage
    typer.echo(f"   first question, new engine: {common.reused(usage.reused_tokens)}, {usage.computed_tokens} computed")
    _say(usage.document_tokens_computed == 0, "no document is ever computed again")


def _ask_three_times(table: Table, model: Model, graph: ContextGraph, name: str, method: Method, folder: Path) -> bool:
    """Ask cold, warm and after a restart; whether the answers agree and only the cold one computed documents."""
    from kvgraph.engine.engine import Engine

    runs: list[Result] = []
    for labels in (("cold", "warm"), ("restart",)):
        with Engine(model, store=folder) as engine:
            for label in labels:
                engine.scheduler.peak_bytes = 0  # of this question alone
                result = engine.generate(graph, method, max_tokens=NEW_TOKENS, ignore_eos=True)
                engine.flush()
                runs.append(result)
                usage, peak = result.usage, common.human_size(engine.scheduler.peak_bytes)
                sources = ", ".join(f"{n:,} {tier}" for tier, n in usage.reused_tokens.items()) or "-"
                computed, of_documents = f"{usage.computed_tokens:,}", f"{usage.document_tokens_computed:,}"
                first = common.human_time(usage.ttft)
                table.add_row(name, label, computed, of_documents, sources, first, peak, end_section=label == "restart")
    cold, *again = runs
    return all(r.token_ids == cold.token_ids and r.usage.document_tokens_computed == 0 for r in again)


def _difference(model: Model, method: Method, graph: ContextGraph) -> float:
    """Largest difference of the engine's logits from one dense forward's, in standard deviations of those.

    Over the first three documents: the dense forward attends with a mask of tokens × tokens.
    """
    import torch

    from kvgraph.engine.engine import Engine

    kept = range(3)
    edges = [(s, r) for s, r in graph.edges if s in kept and r in kept]
    few = ContextGraph([graph.segments[i] for i in kept], graph.query, graph.prefix, edges)
    engine = Engine(model)
    plan = engine.plan(few, method)
    dense = plan.dense()
    arrays = (torch.from_numpy(a) for a in (dense.tokens, dense.positions, dense.visible))
    expected = model.dense(*arrays)[-1]
    engine.logits(plan)  # so that the next one reads stored KV only
    return float((engine.logits(plan) - expected).abs().max() / expected.std())


def _say(ok: bool, what: str) -> None:
    typer.echo(f"   {'✓' if ok else '✗'} {what}")
