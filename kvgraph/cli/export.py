"""`kvgraph train export`: take a model out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="The folder of a run, a checkpoint in it, or a torch.distributed.checkpoint folder.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="For a torch.distributed.checkpoint folder: the model it was trained from, as folder or hub name.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [default: that of the model it was trained from].")
    ] = None,
) -> None:
    """Write a trained model as an ordinary Hugging Face folder.

    For a run, the latest checkpoint is used. Folders that other trainers, such as KVLink's, write with
    torch.distributed.checkpoint (.metadata and *.distcp files) are read too, with the parameter names of Hugging Face,
    torchtune or torchtitan. Read them only if you trust their source, because PyTorch unpickles their index.

    \b
      kvgraph train export runs/kvlink-5 ./llama-kvlink-5
      kvgraph train export step-6000 ./llama-kvlink-5 --base meta-llama/Llama-3.2-1B-Instruct --dtype bfloat16
    """
    from kvgraph.train.export import export

    found = export(checkpoint, out, base=base, dtype=dtype)
    typer.echo(f"the model of {found} is in {out}")
