"""`kvgraph tune`: tune a model for composed caches on your own documents, without labels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvgraph import methods as known
from kvgraph.cli import common
from kvgraph.cli.common import ModelName
from kvgraph.data import corpus

if TYPE_CHECKING:
    from kvgraph.train.gap import GapRow
    from kvgraph.train.tune import Estimate, Excerpt


def tune(
    model: ModelName,
    documents: Annotated[Path, typer.Argument(metavar="DOCUMENTS", help="JSON Lines, text file or folder.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="ADAPTER", help="A new folder for the adapter, or an earlier one's; its run is beside it."
        ),
    ],
    method: Annotated[
        list[str] | None, typer.Option(help="Method to tune for; repeat it to mix methods [default: block].")
    ] = None,
    edges: Annotated[
        list[str] | None, typer.Option(help="For methods that read edges, as in `ask`; may be repeated [default: all].")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Questions about the documents: one per line, or {"question"} each.'),
    ] = None,
    write: Annotated[int, typer.Option(min=0, help="Questions that the model writes itself.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, of two records each.")] = 80,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA adapter.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of records, their order and the adapter.")] = 0,
    template: common.Template = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done and the time.")] = False,
) -> None:
    """Tune a model to answer by a method as it does by full, on your documents and without labels.

    The teacher is the model itself under full. The student is the model with a LoRA adapter under the methods. Both
    read passages of your documents, quote them, and answer questions that the model writes about them. Some documents
    are held out; at the end, a table shows how much of the gap to full is closed on them. The adapter is an ordinary
    PEFT folder; give it to any command with --adapter. You can stop at any time: the same command resumes.

    \b
      kvgraph tune ./llama docs --out docs-adapter --dry-run
      kvgraph tune ./llama docs --out docs-adapter --method block --method graph-kv
      kvgraph ask ./llama "Who dug the harbour?" --adapter docs-adapter --documents docs --method block
    """
    specs = method or ["block"]
    for spec in specs:
        known.parse(spec)
    found = corpus.load(documents, None if template is None else common.unescaped(template))
    from kvgraph.train import tune as tuning

    tuning.check_out(out, model, documents)
    passages = tuning.passages_of(found)
    given = tuning.given(questions, passages) if questions else []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) if dry_run else tuning.run_of(out) / "data"
        config = tuning.configuration(
            model,
            specs,
            edges or ["all"],
            data,
            steps=steps,
            lora_rank=rank,
            lr=lr,
            seed=seed,
            evaluate_every=max(1, steps // 4),
            save_every=max(1, steps // 4),
        )
        made_from = tuning.hash_of(passages, given, write, steps, seed)
        if not tuning.is_prepared(data, made_from):
            asked = [] if dry_run else _asked(model, passages, given, write, seed)
            tuning.prepare(passages, data, 2 * steps, asked, seed, made_from)
        _show_estimate(tuning.estimate(config, passages), config.stages[0].steps)
        if dry_run:
            return
        lines = tuning.tune(config, out, lambda text: typer.echo(text, err=True))
    show_lines(lines)
    typer.echo(f"the adapter is in {out}; use it with --adapter {out}")


def _asked(
    model: str, passages: list[Excerpt], given: list[tuple[Excerpt, str]], write: int, seed: int
) -> list[dict[str, Any]]:
    """The given questions and some that the model writes, about what is trained on and what is held out."""
    if not (given or write):
        return []
    from kvgraph.engine.engine import Engine
    from kvgraph.train import tune as tuning

    trained = tuning.split(passages)
    with Engine.load(model) as engine:
        asked = tuning.answered(engine, given) if given else []
        for side, count in zip(trained, (write, write // 4), strict=True):
            asked += tuning.written(engine, side, count, seed)
    typer.echo(f"{len(asked)} questions whose answers depend on the documents", err=True)
    return asked


def _show_estimate(found: Estimate, steps: int) -> None:
    typer.echo(
        f"{found.documents:,} documents, {found.passages:,} passages, of which {found.held_out:,} are held out; "
        f"{steps:,} steps over {found.tokens:,} tokens take about {common.human_time(found.seconds)} here",
        err=True,
    )


def show_lines(lines: list[GapRow]) -> None:
    """Print the table of what composing costs before and after tuning."""
    table = common.table("", "answers", "nats before", "after", "gap closed", "KL before", "after", "agrees", left=1)
    for line in lines:
        closed = "" if line.closed != line.closed else f"{line.closed:.0%} ± {line.interval:.0%}"
        edges = "" if line.edges == "none" else f" ({line.edges})"
        table.add_row(
            f"{line.kind}, {line.method}{edges}",
            f"{line.answers:,}",
            f"{line.before:.3f}",
            f"{line.after:.3f}",
            closed,
            f"{line.kl_before:.3f}",
            f"{line.kl_after:.3f}",
            f"{line.agrees_after:.1%}",
        )
    common.show(table)
