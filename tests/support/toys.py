"""A package outside kvgraph, written into a folder: it adds a method, a preset and a shape of edges.

Run as a program, `toys.py FOLDER` uses them through every part of kvgraph; FOLDER holds a tiny model. It fails unless the
package of `write` can be found, as an installed one can.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import installed

MODULE = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from kvgraph.methods.base import (
    Method, Variation, check, end, ids, prefix_spans, require_int, segments_read, where_computed,
)
from kvgraph.plan import Place, Plan, contiguous


@dataclass(frozen=True)
class Mirror(Method):
    """The last segment stands first; each reads those of its sources that stand before it.

    gap: positions left free before every segment.
    """

    name: ClassVar[str] = "mirror"

    gap: int = 0
    note: str = ""

    def __post_init__(self):
        require_int(self.name, "gap", self.gap)

    @property
    def reads_edges(self):
        return True

    def variations(self):
        return {"keep": [Variation("gap", "five free positions", replace(self, gap=self.gap + 5))]}

    def plan(self, graph):
        check(graph, self.name, reads_edges=True)
        spans, made = prefix_spans(graph), {}
        for segment in reversed(segments_read(graph)):
            if segment.tokens:
                sources = [made[s] for s, r in graph.edges if r == segment.number and s in made]
                made[segment.number] = len(spans)
                spans.append(segment.span(end(spans) + self.gap, [Place(s, spans[s].start) for s in sources]))
        query = contiguous(ids(graph.query), end(spans), where_computed(spans), cached=False, name="query")
        return Plan((*spans, query), self.name)


def wide():
    """Mirror with ten free positions."""
    return Mirror(gap=10)


def ring(n, argument, self_edges):
    """Each segment reads the next, the last one the first."""
    return None if argument or self_edges else tuple(((i + 1) % n, i) for i in range(n))
'''
ENTRY_POINTS = """
[kvgraph.methods]
mirror = mirror:Mirror
[kvgraph.presets]
mirror-wide = mirror:wide
[kvgraph.edges]
ring = mirror:ring
"""


def write(folder: Path, module: str = MODULE, entry_points: str = ENTRY_POINTS) -> None:
    """The package as an installer leaves it: one file, and what it declares."""
    (folder / "mirror.py").write_text(module)
    installed.declare(folder, "mirror", entry_points)


def main(folder: Path) -> None:
    import torch

    import eval_worker
    from kvgraph import ContextGraph, Engine, methods, models
    from kvgraph.edges import named_edges
    from kvgraph.eval import ablate
    from kvgraph.eval.run import evaluate
    from kvgraph.explain import explain

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = models.load(folder)
    method = methods.parse("mirror:gap=2")
    assert methods.get("mirror-wide") == methods.parse("mirror:gap=10") and {"mirror"} == set(methods.METHODS) - OWN
    for note in ("", "a", "none", "5", "a,b=c", '"', "[x]", "é \n"):
        odd = methods.with_fields(method, {"note": note})
        assert methods.parse(methods.format(odd)) == odd

    graph = ContextGraph(["one fact. ", "two. ", "three."], "Why?", "Read. ", named_edges("ring", "abc"))
    with Engine(model, store=folder / "kv") as engine:
        _engine(engine, graph, method)
        assert "mirror: 5 spans" in explain(engine.plan(graph, "mirror"))
        summary = evaluate(engine, eval_worker.TASK, "mirror:gap=2", eval_worker.items(2), folder / "run", edges="ring")
        assert summary["errors"] == 0 and summary["method"]["fields"] == {"gap": 2, "note": ""}
    ablated = ablate.run(
        lambda: Engine(model), eval_worker.TASK, method, eval_worker.items(2), ["keep", "reversed-edges"],
        folder / "ablated", edges="ring",
    )  # fmt: skip
    assert [row.run.folder.name for row in ablated.rows] == ["base", "gap", "reversed-edges"], ablated
    _training(model, graph, method)
    _server(folder)
    _command_line(folder)
    print("used everywhere")


OWN = {"full", "block", "kvlink", "graph-kv", "pcw", "ape", "prompt-cache", "epic", "cacheblend"}


def _engine(engine, graph, method) -> None:
    """It computes what one dense forward does, and what is stored is read."""
    from dense import dense_logits

    plan = engine.plan(graph, method)
    assert [span.segment for span in plan.spans] == [None, 2, 1, 0, None] and plan.spans[2].sees
    assert (engine.logits(plan) - dense_logits(engine.model, plan)).abs().max() < 1e-4
    assert engine.encode(graph, "mirror:gap=2").computed_tokens == 0
    results = [engine.generate(graph, given, max_tokens=3) for given in (method, "mirror:gap=2")]
    assert results[0].token_ids == results[1].token_ids and not results[1].usage.document_tokens_computed


def _training(model, graph, method) -> None:
    """Its mask gives the likelihoods that the engine gives."""
    import torch

    from kvgraph import Engine, demo, methods, models
    from kvgraph.train.config import Component
    from kvgraph.train.example import Example
    from kvgraph.train.forward import logits
    from kvgraph.train.mixture import Mixture, open_source
    from kvgraph.train.pack import lay

    answer = [7, 8, 9]
    with Engine(model) as engine:
        told = graph.tokenized(engine.tokenize)
        scores = engine.score(told, answer, method).scores
    packed = lay(Example.of(told, answer), method)
    with torch.no_grad():
        found = logits(models.trainable(models.load(model.name).hf), packed).log_softmax(-1)
    assert (found.gather(1, packed.targets[:, None])[:, 0] - scores).abs().max() < 1e-4
    component = Component("world", "world:hops,entities=2-2", ("mirror:gap=1",), edges=("ring",))
    source = open_source(component, "", models.load_tokenizer(demo.model()), 0, "train")
    (drawn,) = Mixture([component], [source], 0, length=1000, limit=1000).draw()
    assert drawn.method == methods.parse("mirror:gap=1") and drawn.example.graph.edges


def _server(folder: Path) -> None:
    import httpx

    from serving import serve

    body = {
        "model": folder.name,
        "messages": [{"role": "user", "content": "Why?"}],
        "documents": [{"text": text} for text in ("one", "two", "three")],
        "kvgraph": {"method": "mirror", "gap": 3, "edges": "ring"},
        "max_tokens": 2,
    }
    with serve(folder, method="mirror-wide") as url:
        shown = httpx.post(f"{url}/v1/plan", json=body, timeout=60).json()
        assert shown["method"] == "mirror" and [s["segment"] for s in shown["spans"]][-4:] == [2, 1, 0, None], shown
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        card = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["kvgraph"]
        assert card["default_method"] == "mirror" and "mirror" in card["methods"] and "mirror-wide" in card["presets"]
        refused = httpx.post(f"{url}/v1/graphs", json={"segments": [{"text": "a"}], "method": "mirror"}, timeout=60)
        assert refused.status_code == 400 and "can't encode a part" in refused.text, refused.text
        named = [m["name"] for m in httpx.get(f"{url}/playground/data.json", timeout=60).json()["methods"]]
        assert "mirror" in named and "mirror-wide" in named


def _command_line(folder: Path) -> None:
    from kvgraph.cli import main as command

    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"title": t, "text": t}) + "\n" for t in ("one", "two")))
    words = ["--documents", str(corpus), "--edges", "ring", "--method", "mirror:gap=4"]
    for line in (
        ["explain", str(folder), *words],
        ["ask", str(folder), "Why?", *words, "--max-tokens", "2", "--no-check"],
        ["eval", "--list"],
    ):
        try:
            command(line)
        except SystemExit as exit_:
            assert not exit_.code, line


if __name__ == "__main__":
    main(Path(sys.argv[1]))
