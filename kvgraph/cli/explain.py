"""`kvgraph explain`: the plan of a graph, without the model's weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kvgraph import methods
from kvgraph.cli import common
from kvgraph.cli.common import Documents, Edges, MethodName, Pick, Prefix, Template
from kvgraph.errors import GraphError, ModelError
from kvgraph.explain import explain as as_text
from kvgraph.graph import check_text


def explain(
    documents: Documents,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Folder or hub name of a model; only its tokenizer is read."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Instead of MODEL: folder or hub name of a tokenizer.")] = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="Documents, prefix and question are token ids, such as '5 17 3'.")
    ] = False,
    question: Annotated[str | None, typer.Option(help="The query [default: a short placeholder].")] = None,
    pick: Pick = None,
    method: MethodName = None,
    edges: Edges = "",
    prefix: Prefix = "",
    template: Template = None,
) -> None:
    """Show a plan: what is encoded, who sees whom, what is cached.

    "doc 1 @ 17" means that token 0 of doc 1 stands at position 17 for this reader. Nothing is computed.

    \b
      kvgraph explain ./llama --documents corpus.jsonl --pick 0,3,7 --method graph-kv --edges all
      kvgraph explain --ids --documents ids.txt --method kvlink:links=2,link_start=100
    """
    sources = [source for source in (model, tokenizer) if source is not None]
    if len(sources) + ids != 1:
        raise typer.BadParameter("give one of MODEL, --tokenizer DIR or --ids, which say how to count tokens")
    chosen = None if method is None else methods.parse(method)
    found = common.chosen(documents, template, pick, token_ids=ids)
    if question is None:
        question = "0" if ids else "?"
    tuned_for: tuple[str, ...] = ()
    if ids:
        graph = common.graph_of(found, _ids(question), _ids(prefix), edges, piece=_ids)
    else:
        encode, tuned_for = _source(sources[0])
        graph = common.graph_of(found, common.unescaped(question), common.unescaped(prefix), edges).tokenized(encode)
    typer.echo(as_text(methods.resolve(chosen, tuned_for).plan(graph)))


def _ids(text: str) -> list[int]:
    """Token ids written with spaces, commas or as a JSON list."""
    words = re.findall(r"[^\s,\[\]]+", text)
    bad = next((w for w in words if not common.DIGITS.fullmatch(w)), None)
    if bad is not None:
        raise GraphError(f"{bad[:40]!r} isn't a token id; with --ids, give only token ids")
    return [int(w) for w in words]


def _source(source: str) -> tuple[Callable[[str], list[int]], tuple[str, ...]]:
    """The model's tokenizer, and the methods that the model declares tuning for."""
    from kvgraph import models

    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1  # hub names never do, as in `ask`
    if looks_local and not Path(source).expanduser().is_dir():
        raise ModelError(f"there is no folder {source}")
    tokenizer = models.load_tokenizer(source)
    return lambda text: tokenizer.encode(check_text(text), add_special_tokens=False), models.tuned_for(source)
