"""`kvgraph ask`: one question over some documents, answered from their stored KV."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph import methods
from kvgraph.cli import common, conversation
from kvgraph.cli.common import (
    Adapter,
    AllowUntested,
    CodecName,
    Device,
    Dtype,
    Edges,
    Json,
    KVBudget,
    MethodName,
    NoCheck,
    Pick,
    Prefix,
    Quantize,
    StorePlaces,
    Template,
)
from kvgraph.cli.conversation import Indexed, IndexName, Retrieve
from kvgraph.data.retrieval import Hit

if TYPE_CHECKING:
    from kvgraph.engine.result import Result


def ask(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="Folder or hub name of a Hugging Face causal LM, or a GGUF file [default: that of the index, else of "
            "`kvgraph demo`].",
        ),
    ],
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The query, as the model should read it.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option("--documents", metavar="CORPUS", help="JSON Lines, text file or folder.")
    ] = None,
    index: IndexName = None,
    retrieve: Retrieve = 5,
    pick: Pick = None,
    store: StorePlaces = None,
    codec: CodecName = "raw",
    method: MethodName = None,
    edges: Edges = "",
    prefix: Prefix = "",
    template: Template = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    as_json: Json = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
) -> None:
    """Answer a question over documents of a corpus, or over what an index has for it.

    With --index, the chunks that fit the question best are found, and named after the answer.

    Stored documents are read instead of being computed; missing ones are computed and stored. The answer streams to
    stdout, and a line on stderr says what was computed, what was reused, and how fast. The question, the prefix and the
    documents are tokenized one by one and joined without changes. Write special tokens, such as BOS or those of a chat
    template, into --prefix and QUESTION. (With --index, the model's chat template is used.)

    \b
      kvgraph ask --index docs --store kv "Who dug the harbour?"
      kvgraph ask ./llama "\\nWho dug the harbour?\\n" --documents corpus.jsonl --pick 0,3,7 --method block --store kv
      kvgraph ask ./llama "..." --documents corpus.jsonl --method graph-kv --edges top-k:3
    """
    name: str | None = model
    if question is None:
        name, question = None, model
    folder = _checked(index, store, documents, pick=pick, method=method, edges=edges, prefix=prefix, template=template)
    chosen = None if method is None else methods.parse(method)
    graph = None
    if documents is not None:
        picked = common.chosen(documents, template, pick)
        graph = common.graph_of(picked, common.unescaped(question), common.unescaped(prefix), edges)
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(map(common.unescaped, stop or ())),
    )
    engine = Engine.load(
        name or conversation.model_of(folder, index),
        adapter=adapter,
        dtype=dtype,
        quantize=quantize,
        device=device,
        allow_untested=allow_untested,
        check=not no_check,
        kv_budget=kv_budget,
        store=store or None,
        codec=codec,
    )
    with engine:
        hits = None
        if folder is not None and index is not None:
            with closing(Indexed(engine, folder, index)) as indexed:
                hits = indexed.find(question, retrieve)
                graph, chosen = indexed.prompt((), common.unescaped(question), hits), indexed.method
        assert graph is not None
        if as_json:
            result = engine.generate(graph, chosen, params)
            typer.echo(json.dumps(_as_json(result, hits), ensure_ascii=False))
            return
        for chunk in engine.stream(graph, chosen, params):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if chunk.result is not None:
                sys.stdout.write("\n" + conversation.citations(hits or ()))
                sys.stdout.flush()
                typer.echo(_usage(chunk.result), err=True)


def _checked(
    index: str | None, store: list[str] | None, documents: Path | None, **others: str | list[str] | None
) -> Path | None:
    """The folder of the index, None without one. Raises BadParameter for options that don't go together."""
    if index is None:
        if documents is None:
            raise typer.BadParameter("ask needs --documents CORPUS or --index NAME")
        return None
    given = ["documents"] if documents is not None else [name for name, value in others.items() if value]
    if given:
        raise typer.BadParameter(f"an index has its own documents, edges and method; leave out --{given[0]}")
    return conversation.folder_of(store)


def _usage(result: Result) -> str:
    u = result.usage
    rate = f", {(u.completion_tokens - 1) / u.decode:,.1f} tokens/s" if u.completion_tokens > 1 and u.decode else ""
    return (
        f"[prompt {u.prompt_tokens:,} tokens: {u.computed_tokens:,} computed ({u.document_tokens_computed:,} of documents), "
        f"{common.reused(u.reused_tokens)}; first token {common.human_time(u.ttft)}; "
        f"{u.completion_tokens} generated{rate}; {result.finish_reason}]"
    )


def _as_json(result: Result, hits: list[Hit] | None) -> dict[str, object]:
    usage = asdict(result.usage) | {"document_tokens_computed": result.usage.document_tokens_computed}
    cited: dict[str, object] = {} if hits is None else {"citations": [hit._asdict() for hit in hits]}
    return cited | {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "usage": usage,
    }
