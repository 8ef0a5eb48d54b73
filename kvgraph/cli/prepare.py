"""`kvgraph data prepare`: data to train on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph.cli import common
from kvgraph.progress import Progress

if TYPE_CHECKING:
    from kvgraph.train.prepare.run import State


def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which source; --list shows them.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; interrupted runs resume.")
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            metavar="PATH|HUB",
            help="The raw records: a JSON Lines, JSON or Parquet file, a folder of these, or NAME or NAME:CONFIG on "
            "the hub [default: the source's own data set on the hub].",
        ),
    ] = "",
    sample: Annotated[
        bool, typer.Option("--sample", help="Use a few records that ship with kvgraph; needs no network.")
    ] = False,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Folder or hub name of a model, to count tokens; some sources select or cut texts by length "
            "[default with --sample: bytes].",
        ),
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many records; a larger limit continues later.")
    ] = None,
    validation: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of documents in the validation set.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting of the source; may be repeated. --list shows them."
        ),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show sources and their settings, and exit.")] = False,
) -> None:
    """Prepare training data: train.jsonl, validation.jsonl, and prepared.json, which describes them.

    Records are texts without prompts, for any model. You can stop at any time, even with kill -9: the same command
    resumes and ends with the same files. docs/reference/data.md describes them.

    \b
      kvgraph data prepare tulu --sample --out data/tulu
      kvgraph data prepare fineweb-text-mem --tokenizer ./llama --limit 10000 --out data/text-mem
      kvgraph data prepare xsum --source xsum.jsonl --tokenizer ./llama --out data/xsum
    """
    if list_all:
        _list()
        return
    if not name or out is None:
        raise typer.BadParameter("prepare needs a NAME and --out; --list shows the names")
    if sample and source:
        raise typer.BadParameter("give --sample or --source, not both")
    pairs = [setting.partition("=") for setting in settings or ()]
    if unset := [key for key, equals, _ in pairs if not equals]:
        raise typer.BadParameter(f"--set {unset[0]} has no value; write NAME=VALUE")
    from kvgraph.train import prepare
    from kvgraph.train.prepare import rows, run
    from kvgraph.train.prepare.tokens import Tokens

    chosen = prepare.get(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    measure = Tokens.load(tokenizer) if tokenizer else Tokens.of_bytes() if sample and chosen.needs_tokenizer else None
    try:
        with _Bar(name, limit) as bar:
            state = run.prepare(
                chosen,
                rows.reader(chosen, source, sample=sample, revision=run.revision(out)),
                out,
                tokenizer=measure,
                settings={key: value for key, _, value in pairs},
                seed=seed,
                validation=validation,
                limit=limit,
                on_progress=bar.update,
                say=bar.doing,
            )
    except KeyboardInterrupt:
        typer.echo("stopped; prepared records are kept; run the same command again to continue", err=True)
        raise
    _show(state, out)
    if bar.said:
        typer.echo(f"{name}: {bar.said}")


class _Bar(Progress):
    """Shows records and records per second."""

    def __init__(self, label: str, total: int | None):
        super().__init__(label, total)
        self.label, self.said, self.before = label, "", -1

    def update(self, state: State) -> None:
        """Show how many records there are."""
        records = sum(state["counts"][split]["records"] for split in ("train", "validation"))
        if self.before < 0:  # records of an earlier run don't count for the rate
            self.before, self.started = records, time.perf_counter()
        rate = (records - self.before) / max(1e-9, time.perf_counter() - self.started)
        self.show(records, f"{rate:,.0f} records/s" if rate else "")

    def doing(self, text: str) -> None:
        """Show what a source is doing, after its name. The command ends with the last of these texts."""
        self.said = text
        self.show(label=f"{self.label}  {text}")


def _list() -> None:
    """Print the sources and their settings."""
    from kvgraph.train.prepare import SOURCES

    made = common.table("source", "what it is", "from", "tokenizer", left=4)
    for source in SOURCES.values():
        made.add_row(source.name, source.about, source.hub.name, "needed" if source.needs_tokenizer else "")
    common.show(made)
    made = common.table("source", "--set", "default", "what it is", left=4)
    for source in SOURCES.values():
        for i, (name, setting) in enumerate(source.settings.items()):
            made.add_row("" if i else source.name, name, setting.default, setting.about)
    if made.row_count:
        common.show(made)


def _show(state: State, out: Path) -> None:
    """Print what the folder holds now."""
    counts = state["counts"]
    made = common.table("split", "records", "documents", "characters", "tokens")
    for split in ("train", "validation"):
        count = counts[split]
        tokens = f"{count['tokens']:,}" if state["tokenizer"] else ""
        made.add_row(split, *(f"{count[name]:,}" for name in ("records", "documents", "characters")), tokens)
    common.show(made)
    if counts["skipped"]:
        skipped = common.table("skipped", "source records")
        for reason, number in sorted(counts["skipped"].items(), key=lambda pair: -pair[1]):
            skipped.add_row(reason, f"{number:,}")
        common.show(skipped)
    typer.echo(f"{state['name']}: {counts['read']:,} source records read, {out}")
