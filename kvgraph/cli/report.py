"""`kvgraph report`: finished evaluations as a page for people and as JSON, and comparisons of two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph.cli import common
from kvgraph.data import io

if TYPE_CHECKING:
    from kvgraph.eval.compare import Comparison
    from kvgraph.eval.report import Report


def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR...", help="Folders with finished runs, at any depth.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="HTML", help="The page [default: report.html, unless another file is given]."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="MD", help="The page's tables as Markdown.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="JSON", help="The numbers as JSON.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two runs instead: what changed, and is it more than noise?"),
    ] = None,
) -> None:
    """Show evaluations: tables, intervals, paired tests and plots.

    The page is self-contained: it works offline, in light and dark mode, and on paper. --compare prints which settings
    differ between two runs, their scores with paired tests, and the items that one got right and the other wrong.

    \b
      kvgraph report runs --out report.html --markdown report.md
      kvgraph report --compare runs/hotpotqa/full runs/hotpotqa/graph-kv
    """
    if (compare is None) == (not folders):
        raise typer.BadParameter("give folders of runs, or --compare with two runs")
    if compare is not None:
        if out or markdown:
            raise typer.BadParameter(
                "--compare prints its result and writes only --json; leave --out and --markdown out"
            )
        _compare(*compare, as_json)
        return
    from kvgraph.eval import report as reports

    made = reports.build(folders or [])
    if not (markdown or as_json):
        out = out or Path("report.html")
    for path, text in ((out, made.html), (markdown, made.markdown), (as_json, lambda: _json(made.as_json()))):
        if path is not None:
            io.write(path, text())
            typer.echo(f"wrote {path}", err=True)
    _show(made)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _show(made: Report) -> None:
    """Print the headline score of every run, and why some numbers can't be compared."""
    table = common.table("task", "model", "method", "metric", "score [95 % interval]", "difference", "p", left=4)
    from kvgraph.eval.stats import p_text

    for section in made.sections:
        for line in section.lines:
            star = " *" if line.label == section.best else ""
            difference = "" if line.difference is None else str(line.difference)
            p = "" if line.p is None else p_text(line.p)
            table.add_row(
                section.task, section.model, line.label + star, section.metric, str(line.run.score), difference, p
            )
    common.show(table)
    if any(section.best for section in made.sections):
        typer.echo("* beats each of the others in a paired test (p < 0.05)")
    for warning in made.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _compare(a: Path, b: Path, as_json: Path | None) -> None:
    from kvgraph.eval.compare import compare

    found = compare(a, b)
    if as_json is not None:
        io.write_json(as_json, found.as_json())
    _show_comparison(found)


def _show_comparison(found: Comparison) -> None:
    """Print a comparison: settings, scores, items, costs, and the verdict last."""
    from kvgraph.eval.runs import shown
    from kvgraph.eval.stats import p_text

    if found.settings:
        table = common.table("setting", "A", "B", left=3)
        for path, before, after in found.settings:
            table.add_row(path, shown(before), shown(after))
        common.show(table)
        typer.echo("")
    table = common.table("score", "items", "A", "B", "B - A [95 % interval]", "p", "B better", "B worse")
    for row in found.rows:
        d = row.difference
        table.add_row(
            row.name, f"{d.n:,}", f"{100 * row.a:.1f}", f"{100 * row.b:.1f}", str(d), p_text(d.p),
            f"{d.better:,}", f"{d.worse:,}",
        )  # fmt: skip
    common.show(table)
    typer.echo("")
    if found.flips:
        table = common.table("item", "A", "B", "gold", "A answered", "B answered", left=6)
        for flip in found.flips[:10]:
            table.add_row(*flip.cells())
        common.show(table)
        if len(found.flips) > 10:
            typer.echo(f"... and {len(found.flips) - 10:,} more; --json FILE has them all")
        typer.echo("")
    for name, before, after in found.costs:
        typer.echo(f"{name}: {before} -> {after}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(found.verdict)
