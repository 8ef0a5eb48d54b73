"""`kvgraph data ...`: data to train and evaluate on."""

from __future__ import annotations

import typer

from kvgraph.cli import prepare, world

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command()(world.world)
app.command()(prepare.prepare)


@app.callback()
def data() -> None:
    """Make data to train and evaluate on.

    \b
      kvgraph data world --kind chunks --out world.jsonl
      kvgraph data prepare tulu --out data/tulu
    """
