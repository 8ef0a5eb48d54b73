"""`kvgraph eval`: one task, by one or several methods, on one model."""

from __future__ import annotations

import signal
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
    HostBudget,
    KVBudget,
    NoCheck,
    Quantize,
    StorePlaces,
)

if TYPE_CHECKING:
    from kvgraph.eval.ablate import Table
    from kvgraph.eval.run import Summary


def evaluate(
    task: Annotated[str, typer.Option("--task", help="Which task; --list shows them.")] = "",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="As in `kvgraph ask`; repeat it to compare methods on the same items."),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Folder or hub name of a Hugging Face causal LM.")] = "",
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH|hub|generated",
            help="A file or folder in the data set's own schema, or 'hub' for the full set. World tasks generate their "
            "data: 'generated:order=shuffled,seed=1'.",
        ),
    ] = "hub",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of items: the first, or with --shuffle random ones.")
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Draw random items, by --seed, instead of taking the first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of --shuffle and of the confidence intervals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Each run is written to DIR/TASK/METHOD; interrupted runs resume."),
    ] = None,
    store: StorePlaces = None,
    codec: CodecName = "raw",
    edges: Annotated[
        str | None,
        typer.Option(
            help="For methods that read edges: as in `kvgraph ask`, or 'links' for the data's [default: the task's]."
        ),
    ] = None,
    ablate: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Run ablations instead, variants with one thing changed each: all, or some of mask-positions, "
            "random-edges, reversed-edges, rounds, keep, order, distractors, separated by commas. They are written to "
            "DIR/TASK/METHOD/ablations.",
        ),
    ] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum per answer [default: the task's].")] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    host_budget: HostBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
    list_all: Annotated[bool, typer.Option("--list", help="Show tasks and methods, and exit.")] = False,
) -> None:
    """Evaluate methods on a task: same items, same prompt, same decoding.

    Each item's answer, scores and costs are written to results.jsonl, and means with 95 % confidence intervals to
    summary.json. You can stop at any time: the same command resumes. With --store, a run reads the documents that
    earlier runs encoded. With --codec, answers are those of records that the codec has packed, stored or not.

    \b
      kvgraph eval --task hotpotqa --method full --method graph-kv --model ./llama --data hotpot.jsonl --out runs
      kvgraph eval --task nq --method block --model ./llama --limit 200 --shuffle --store kv --out runs
      kvgraph eval --task morehopqa --method graph-kv --ablate all --model ./llama --data morehopqa.json --out runs
    """
    if list_all:
        _list()
        return
    specs = method or []
    for name, given in (("--task", task), ("--method", specs), ("--model", model), ("--out", out)):
        if not given:
            raise typer.BadParameter(f"eval needs {name}; --list shows tasks and methods")
    if len(set(specs)) < len(specs):
        raise typer.BadParameter("the same --method is given twice")
    parsed = list(map(methods.parse, specs))
    from kvgraph.data import tasks
    from kvgraph.data.items import read
    from kvgraph.eval import ablate as ablations
    from kvgraph.eval.run import evaluate, slug
    from kvgraph.store.codecs.registry import parse as parse_codec

    names, lossless = ablations.parse(ablate), parse_codec(codec).lossless

    chosen = tasks.get(task)
    if edges is not None and not any(m.reads_edges for m in parsed):
        raise typer.BadParameter(f"none of these methods reads edges: {', '.join(specs)}; leave --edges out")
    found = read(chosen, data, limit, shuffle=shuffle, seed=seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    from kvgraph.engine.engine import Engine, load_model

    loaded = load_model(
        model,
        adapter=adapter,
        dtype=dtype,
        quantize=quantize,
        device=device,
        allow_untested=allow_untested,
        check=not no_check,
    )
    assert out is not None
    options: dict[str, Any] = {"data": found, "edges": edges, "max_tokens": max_tokens, "seed": seed}
    summaries = []

    def open_engine() -> Engine:
        return Engine(loaded, store=store, kv_budget=kv_budget, host_budget=host_budget or 0, codec=codec)

    try:
        for spec, parsed_method in zip(specs, parsed, strict=True):
            folder = out / chosen.name / (slug(spec) if lossless else f"{slug(spec)}+{slug(codec)}")
            if names:
                table = ablations.run(
                    open_engine, chosen, parsed_method, found.items, names, folder / "ablations", **options
                )
                _show_ablations(spec, table)
                continue
            # One engine per method: otherwise costs would depend on what earlier methods left in memory.
            with open_engine() as engine:
                summaries.append(evaluate(engine, chosen, spec, found.items, folder, **options))
    except KeyboardInterrupt:
        typer.echo("stopped; finished items are kept; run the same command again to continue", err=True)
        raise
    if summaries:
        _show(summaries)


def _list() -> None:
    """Print the known tasks and methods."""
    from kvgraph.data.tasks import TASKS

    tasks = common.table("task", "metric", "what it is", left=3)
    for task in TASKS.values():
        tasks.add_row(task.name, task.metrics[0], task.about)
    common.show(tasks)
    made = common.table("method", "what it is", left=2)
    for name, make in {**methods.METHODS, **methods.PRESETS}.items():
        made.add_row(name, (make.__doc__ or "").strip().split("\n")[0])
    common.show(made)


def _show(summaries: list[Summary]) -> None:
    """Print one line per run: score, tokens computed and reused, median time to first token."""
    headline = summaries[0]["headline"]
    made = common.table("task", "method", f"{headline} [95 %]", "n", "errors", "computed", "reused", "TTFT", left=2)
    for summary in summaries:
        score, timing, probed = summary["scores"][headline], summary["timing"], summary["tokens"]["probe"]
        made.add_row(
            summary["task"],
            ", ".join(filter(None, (summary["method"]["spec"], summary.get("codec")))),
            f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]",
            f"{score['n']:,}",
            f"{summary['errors']:,}",
            f"{timing['tokens']['computed']:,}" + (f" + {probed:,} probed" if probed else ""),
            f"{sum(timing['tokens']['reused'].values()):,}",
            "" if timing["ttft"] is None else common.human_time(timing["ttft"]),
        )
    common.show(made)
    for summary in summaries:
        if summary["errors"]:
            typer.echo(f"{summary['method']['spec']}: {_failed(summary)}", err=True)


def _show_ablations(spec: str, found: Table) -> None:
    """Print the base and its variants, one line each."""
    metric = found.rows[0].run.headline
    made = common.table("variant", "what changes", f"{metric} [95 % interval]", "difference", "p", left=2)
    for cells in found.cells():
        made.add_row(*cells)
    typer.echo(f"{found.rows[0].run.task}, {spec}: paired tests on the same items, p after Holm's correction")
    common.show(made)
    for sentence in found.left_out:
        typer.echo(f"left out: {sentence}", err=True)


def _failed(summary: dict[str, Any]) -> str:
    return (
        f"{summary['errors']:,} items couldn't be run and score 0; their errors are in results.jsonl, and the same command "
        "tries them again"
    )
