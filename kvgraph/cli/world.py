"""`kvgraph data world`: corpora and questions of the synthetic world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvgraph.data import io


def world(
    kind: Annotated[
        str, typer.Option(help="hops: a document per entity; chunks: documents cut into chunks that need each other.")
    ] = "hops",
    count: Annotated[int | None, typer.Option(min=1, help="Corpora [default: 100 to write, 1 to show].")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed gives other corpora [default: 0].")] = None,
    settings: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="How corpora are made and written: split, entities, questions, types, order, edges, share, "
            "prefix, statements; docs/reference/world.md explains them.",
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the questions as JSON Lines for `kvgraph eval --data`.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the world's tokenizer, in the form of a model folder.")
    ] = None,
) -> None:
    """Make corpora of the synthetic world and their questions. Without --out or --tokenizer, show some.

    \b
      kvgraph data world --kind chunks --settings order=shuffled
      kvgraph data world --kind chunks --count 100 --settings order=shuffled,edges=wrong --out wrong.jsonl
    """
    from kvgraph.data.world.world import World, records

    if tokenizer is not None and (tokenizer / "tokenizer.json").exists():
        # Other commands read the folder of this option, so it may be a model's.
        raise typer.BadParameter(f"--tokenizer: {tokenizer} has a tokenizer; give a folder without one")
    made = World.parse(kind, settings)
    if seed is not None:
        made = replace(made, seed=seed)
    if out is None and tokenizer is None:
        shown = replace(made, count=count or 1)
        typer.echo("\n\n".join(map(str, shown)))
    if out is not None:
        made = replace(made, count=count or made.count)
        written = 0
        with io.replacing(out) as file:
            for record in records(made):
                file.write(io.line(record))
                written += 1
        typer.echo(f"{written:,} questions over {made.count:,} corpora are in {out}")
    if tokenizer is not None:
        from kvgraph.data.world.tokenizer import write

        write(tokenizer)
        typer.echo(f"the world's tokenizer is in {tokenizer}")
