"""`kvgraph check`: does a model compose exactly, and what does a method cost it?"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
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
    Json,
    KVBudget,
    ModelName,
    Quantize,
    StorePlaces,
)

if TYPE_CHECKING:
    from kvgraph.checks.gate import Case
    from kvgraph.checks.quality import Quality
    from kvgraph.engine.engine import Engine

CLOSE = 0.01  # nats per token: no reader of the answers would notice this difference


def check(
    model: ModelName,
    method: Annotated[
        str | None, typer.Option(help="With --data or --documents: the method to compare with full.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Texts to score: JSON Lines of {"question", "answer", "documents", "prefix"?, "edges"?}.'),
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            metavar="CORPUS",
            help="Your documents: measure on those that `kvgraph tune` holds out, with and without --adapter.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first items, or held-out documents.")] = None,
    store: StorePlaces = None,
    codec: CodecName = "raw",
    as_json: Json = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
) -> None:
    """Check that a model composes exactly, and what a method costs.

    A model composed from cached segments must give the logits of one plain forward. The command prints a table of cases
    and exits with 1 if one fails. Differences are in standard deviations of the plain logits.
    Exact isn't the same as good. With --method and --data, the command also says how much less likely the answers are
    under the method than under full, on identical tokens. A model that wasn't tuned for a method usually loses some
    likelihood.

    With --codec, it says what the codec costs the same answers: they are scored a second time, from records that it packed.

    With --documents there is nothing to prepare: it asks to quote passages of your own documents.

    \b
      kvgraph check ./llama
      kvgraph check ./llama --method block --data questions.jsonl
      kvgraph check ./llama --method block --data questions.jsonl --codec kivi:bits=2
      kvgraph check ./llama --method block --documents docs --adapter docs-adapter
    """
    if (method is None) != (data is None and documents is None) and (codec == "raw" or data is None):
        raise typer.BadParameter("--method and --data (or --documents) belong together")
    if codec != "raw" and data is None:
        raise typer.BadParameter("--codec needs --data: what it costs is measured on answers")
    from kvgraph.checks.gate import gate
    from kvgraph.checks.quality import quality as measured
    from kvgraph.checks.quality import read_items
    from kvgraph.engine.engine import Engine, composed
    from kvgraph.store.codecs.registry import parse as parse_codec

    packing = parse_codec(codec)
    chosen = None if data is None and method is None else methods.parse("full" if method is None else method)
    items = read_items(data, limit) if data else []
    engine = Engine.load(
        model,
        adapter=adapter,
        dtype=dtype,
        quantize=quantize,
        device=device,
        allow_untested=allow_untested,
        check=False,
        kv_budget=kv_budget,
        store=None if chosen is None else store,
    )
    cases = gate(engine.model, composed(engine.model))
    quality = None
    if chosen is not None and data is not None:
        packed = Engine(engine.model, store=store, kv_budget=kv_budget, codec=packing) if codec != "raw" else None
        quality = measured(engine.scores, chosen, items, coded=None if packed is None else (codec, packed.scores))
        for used in filter(None, (engine, packed)):
            used.close()
    passed = all(case.passed for case in cases)
    if as_json:
        found = {
            "model": engine.model.name,
            "passed": passed,
            "cases": [asdict(c) | {"passed": c.passed} for c in cases],
        }
        typer.echo(json.dumps(found | ({} if quality is None else {"quality": asdict(quality)})))
    else:
        _print_cases(engine, cases, passed)
        if quality is not None:
            _print_quality(quality)
        if documents is not None:
            _print_gap(model, adapter, documents, method or "block", limit)
    if not passed:
        raise typer.Exit(1)


def _print_gap(model: str, adapter: str | None, documents: Path, method: str, limit: int | None) -> None:
    """What composing costs on held-out documents, and what an adapter gives back."""
    from kvgraph.cli.tune import show_lines
    from kvgraph.data import corpus
    from kvgraph.models.adapters import folder_of
    from kvgraph.train import tune

    passages = tune.passages_of(corpus.load(documents))
    edges = "all" if methods.parse(method).reads_edges else "none"
    with tempfile.TemporaryDirectory() as scratch:
        tune.prepare(passages, Path(scratch), 0)
        lines = tune.measured(
            model,
            None if adapter is None else folder_of(adapter),
            Path(scratch) / tune.NAME,
            [(method, edges)],
            tune.LENGTH,
            examples=limit or tune.SCORED,
        )
    typer.echo("")
    show_lines(lines)


def _print_cases(engine: Engine, cases: list[Case], passed: bool) -> None:
    table = common.table("case", "what", "tokens", "worst", "limit", "ok", left=2)
    for case in cases:
        worst = "not run" if case.worst is None else f"{case.worst:.1e}"
        ok = "-" if case.worst is None else "yes" if case.passed else "NO"
        table.add_row(case.name, case.what, f"{case.tokens:,}", worst, f"{case.limit:g}", ok)
    common.show(table)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    verdict = "composes exactly" if passed else "does NOT compose exactly; don't serve it"
    typer.echo(f"{engine.model.name} in {dtype} {verdict}")


def _print_quality(quality: Quality) -> None:
    difference = quality.nll - quality.full_nll
    ratio = math.exp(difference)
    table = common.table("method", "answers", "tokens", "nll / token", "perplexity")
    rows = [("full", quality.full_nll), (quality.method, quality.nll)]
    if quality.codec_nll is not None:
        rows.append((f"{quality.method}, {quality.codec}", quality.codec_nll))
    for name, nll in rows:
        table.add_row(
            name, f"{quality.items:,}", f"{quality.tokens:,}", f"{nll:.4f}", f"{math.exp(min(nll, 700)):,.2f}"
        )
    typer.echo("")
    common.show(table)
    if quality.codec_nll is None or quality.method != "full":
        typer.echo(
            f"difference {difference:+.4f} nats per token, perplexity ×{ratio:.3f}: {_meaning(quality.method, difference)}"
        )
    if quality.codec_nll is not None:
        lost = quality.codec_nll - quality.nll
        costs = "costs nothing to speak of" if lost < CLOSE else "costs a little" if lost < 0.1 else "costs a lot"
        typer.echo(f"codec {quality.codec}: {lost:+.4f} nats per token; it {costs} on these answers.")


def _meaning(method: str, difference: float) -> str:
    if difference <= -CLOSE:
        return f"these answers are more likely under {method} than under full."
    if difference < CLOSE:
        return f"under {method} these answers are as likely as under full."
    if difference < 0.1:
        return f"{method} costs a little on these answers; look at some before you serve it."
    return f"{method} costs this model a lot on these answers; tune it for {method} first, or serve full."
