"""`kvgraph chat`: a conversation in the terminal, over an index if one is given."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from kvgraph import methods
from kvgraph.cli import conversation
from kvgraph.cli.common import (
    Adapter,
    AllowUntested,
    CodecName,
    Device,
    Dtype,
    HostBudget,
    KVBudget,
    MethodName,
    NoCheck,
    Quantize,
    StorePlaces,
)
from kvgraph.cli.conversation import Indexed, IndexName, Retrieve
from kvgraph.data.retrieval import Hit
from kvgraph.errors import KVGraphError
from kvgraph.graph import ContextGraph

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.sampling import SamplingParams

PROMPT = "> "
HINT = "Write a question. Ctrl-C ends an answer, /exit or Ctrl-D the conversation."
HELP, EXIT = ("/help", "/?"), ("/exit", "/quit", "/bye")


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Folder or hub name of a Hugging Face causal LM, or a GGUF file [default: that of the index, else of "
            "`kvgraph demo`].",
        ),
    ] = None,
    index: IndexName = None,
    retrieve: Retrieve = 5,
    store: StorePlaces = None,
    codec: CodecName = "raw",
    method: MethodName = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "cpu",
    kv_budget: KVBudget = None,
    host_budget: HostBudget = None,
    adapter: Adapter = None,
    allow_untested: AllowUntested = False,
    no_check: NoCheck = False,
) -> None:
    """Talk with a model; with --index, about your documents.

    Every line that you write is a turn. With --index, the chunks that fit it best are found, their stored KV is read, and
    the answer says which they were. Ctrl-C ends an answer, /exit or Ctrl-D the conversation. Lines may also come from a
    pipe.

    \b
      kvgraph chat --index docs --store kv
      echo "Who dug the harbour?" | kvgraph chat --index docs --store kv
      kvgraph chat ./llama
    """
    if index is not None and method is not None:
        raise typer.BadParameter("an index has its own method; leave out --method")
    folder = None if index is None else conversation.folder_of(store)
    chosen = None if method is None else methods.parse(method)
    name = model or conversation.model_of(folder, index)
    from kvgraph.engine.engine import Engine
    from kvgraph.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if sys.stdin.isatty():
        typer.echo("Loading the model ...", err=True)
    engine = Engine.load(
        name,
        adapter=adapter,
        dtype=dtype,
        quantize=quantize,
        device=device,
        allow_untested=allow_untested,
        check=not no_check,
        kv_budget=kv_budget,
        host_budget=host_budget or 0,
        store=store or None,
        codec=codec,
    )
    with engine:
        _talk(engine, folder, index, retrieve, chosen, params)


def _talk(
    engine: Engine,
    folder: Path | None,
    index: str | None,
    retrieve: int,
    method: methods.Method | None,
    params: SamplingParams,
) -> None:
    """Answer every line, with what was said before in mind."""
    indexed = None if folder is None or index is None else Indexed(engine, folder, index)
    said: list[dict[str, str]] = []
    try:
        for question in _lines():
            hits: list[Hit] = []
            try:
                if indexed is not None:
                    hits = indexed.find(question, retrieve)
                    graph, using = indexed.prompt(said, question, hits), indexed.method
                else:
                    graph, using = (
                        _plain(engine, said, question),
                        method or methods.resolve(None, engine.model.tuned_for),
                    )
                text = _answered(engine, graph, using, params)
            except KVGraphError as error:
                typer.echo(f"kvgraph: {error}", err=True)
                continue
            sys.stdout.write(conversation.citations(hits))
            sys.stdout.flush()
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    finally:
        if indexed is not None:
            indexed.close()


def _plain(engine: Engine, said: list[dict[str, str]], question: str) -> ContextGraph:
    from kvgraph.data.chat import chat as rendered

    return rendered(engine.model.tokenizer, [*said, {"role": "user", "content": question}]).graph()


def _lines() -> Iterator[str]:
    """What is said, a line each, without empty ones, until the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (edits lines of `input`)

        typer.echo(HINT, err=True)
    while True:
        try:
            line = input(PROMPT) if terminal else sys.stdin.readline()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D ends the conversation", err=True)
            continue
        if not terminal and not line:
            return
        said = line.strip()
        if terminal and said in EXIT:
            return
        if terminal and said in HELP:
            typer.echo(HINT, err=True)
        elif said:
            yield said


def _answered(engine: Engine, graph: ContextGraph, method: methods.Method, params: SamplingParams) -> str:
    """Write an answer as it comes; returns it, as far as it came if Ctrl-C ended it."""
    text = ""
    with _interruptible() as interrupted, closing(engine.stream(graph, method, params)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            text += chunk.text
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if interrupted:
                break
    sys.stdout.write("\n")
    return text.strip()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A block in which Ctrl-C interrupts nothing, but is noted in the list: a step of the model is never cut in two."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
