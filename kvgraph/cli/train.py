"""`kvgraph train`: train a model to answer from composed caches."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kvgraph.cli import common, export
from kvgraph.train import recipes
from kvgraph.train.config import Component, Config, Stage, TrainError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Option(help="A recipe's name; --list shows them.")] = "",
    file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A configuration as JSON, instead of a recipe.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run's folder. If it has checkpoints of this run, training resumes."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume the run in this folder, with its own configuration.")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="NAME=W,...", help="Weights of components in every stage; 0 leaves one out.")
    ] = "",
    method: Annotated[
        list[str] | None, typer.Option(help="Train every component by this method; repeat it to mix methods.")
    ] = None,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases instead of TensorBoard.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration as JSON, and exit.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Show the recipes, and exit.")] = False,
    **overrides: Any,
) -> None:
    """Train a model by a recipe, to answer from composed caches.

    Every setting has an option below, with its default in brackets; recipes set their own. The run's folder gets
    config.json, log.jsonl, TensorBoard's curves, and checkpoints with the model as an ordinary Hugging Face folder. You
    can stop at any time: the same command resumes from the latest checkpoint, with the same data and the same losses as
    without the stop.

    \b
      kvgraph train --list
      kvgraph train --recipe kvlink-5 --model ./llama --data prepared --out runs/kvlink-5
      kvgraph train --recipe kvlink-5 --lr 1e-5 --weights sft-mem=40,xsum=0 --limit 100 --out runs/short
      torchrun --nproc-per-node 8 -m kvgraph.cli train --recipe kvlink-5 --data prepared --out runs/kvlink-5
      kvgraph train --resume runs/kvlink-5
      kvgraph train export runs/kvlink-5 ./llama-kvlink-5
    """
    if context.invoked_subcommand is not None:
        return
    if list_all:
        _list()
        return
    if sum(map(bool, (recipe, file, resume))) != 1:
        raise typer.BadParameter("give one of --recipe, --config and --resume")
    config = recipes.get(recipe) if recipe else Config.read(file or _saved(resume))
    config = replace(config, **{name: value for name, value in overrides.items() if value is not None})
    config = replace(config, stages=_changed(config.stages, _weights(weights), method))
    if show:
        typer.echo(config.to_json(), nl=False)
        return
    folder = resume or out
    if folder is None or (resume and out):
        raise typer.BadParameter("give the run's folder, with --out or --resume")
    from kvgraph.train import trainer

    if os.environ.get("RANK", "0") == "0":
        typer.echo(config.to_json(), nl=False, err=True)
    result = trainer.train(config, folder, wandb=wandb)
    if os.environ.get("RANK", "0") == "0":
        _tell(result, folder)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every setting of Config that is a single value, as Config describes it."""
    hints = get_type_hints(Config, include_extras=True)
    signature = inspect.signature(command, eval_str=True)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    described = [field for field in fields(Config) if get_origin(hints[field.name]) is Annotated]
    made = [_option(field, *get_args(hints[field.name])) for field in described]
    command.__signature__ = signature.replace(parameters=[*plain, *made])  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {p.name: p.annotation for p in (*plain, *made)}
    return command


def _option(field: Field[Any], kind: Any, text: str) -> inspect.Parameter:
    """A setting as an option that is None unless given."""
    if field.default is not MISSING and field.default != "":
        text += f" [{field.default}]"
    annotation = Annotated[kind | None, typer.Option(help=text[0].upper() + text[1:], rich_help_panel="Settings")]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


app.callback(invoke_without_command=True)(_with_options(train))
app.command()(export.export)


def _list() -> None:
    """Print the recipes."""
    table = common.table("recipe", "model", "methods", "steps", left=3)
    for name in recipes.RECIPES:
        config = recipes.get(name)
        components = [component for stage in config.stages for component in stage.components]
        steps = " + ".join(f"{s.steps:,}" if s.steps else f"{s.epochs:g} ep." for s in config.stages)
        trained = dict.fromkeys(spec.partition(":")[0] for c in components for spec in c.methods)
        table.add_row(name, config.model, ", ".join(trained), steps)
    common.show(table)


def _saved(run: Path | None) -> Path:
    """The configuration of a run to resume."""
    path = (run or Path()) / "config.json"
    if not path.is_file():
        raise TrainError(f"{run} isn't the folder of a run; start one with --recipe or --config, and --out")
    return path


def _weights(text: str) -> dict[str, float]:
    """{"qa": 10.0} for "qa=10"."""
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--weights: {item!r} isn't NAME=WEIGHT") from None
    return found


def _changed(stages: tuple[Stage, ...], weights: dict[str, float], methods: list[str] | None) -> tuple[Stage, ...]:
    """The stages with other weights, and with the methods for every component."""
    known = dict.fromkeys(component.name for stage in stages for component in stage.components)
    for name in weights:
        if name not in known:
            raise typer.BadParameter(f"--weights: there is no component {name!r}; there are {', '.join(known)}")

    def changed(component: Component) -> Component:
        return replace(
            component,
            weight=weights.get(component.name, component.weight),
            methods=tuple(methods) if methods else component.methods,
        )

    kept = [[changed(c) for c in stage.components if weights.get(c.name) != 0] for stage in stages]
    return tuple(replace(stage, components=tuple(parts)) for stage, parts in zip(stages, kept, strict=True))


def _tell(result: Any, run: Path) -> None:
    """Print how the run ended, and what to do next."""
    model = result.checkpoint / "model"
    if result.signal is None:
        typer.echo(f"trained {result.step:,} steps; the model is in {model}")
    else:
        typer.echo(
            f"stopped by {result.signal.name} after step {result.step:,}; resume with: kvgraph train --resume {run}",
            err=True,
        )
