"""A method as text means the same in Python, on the command line, in configurations and over HTTP, and so does none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from kvgraph import ContextGraph, Engine, GraphError, KVGraphError, demo, methods, models
from kvgraph.methods import METHODS, PRESETS
from kvgraph.server.settings import Settings
from kvgraph.train.config import Component
from kvgraph.train.mixture import Mixture, open_source
from serving import serve

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning:UserWarning")

TEXTS = ["one", "another", "a third"]
SPECS = ["block", "epic:k=2", "kvlink:links=1,link_start=200", "graph-kv:rounds=0", "graph-kv: layout=tight",
         "cacheblend:selected=[[0],[],[1,2]]", "prompt-cache:slot=9,", "pcw:shared_prefix=true", "kvlink-llama3-0:mem_start=3,mem_end=4"]  # fmt: skip
WRONG = ["nonsense", "epic:k", "epic:k=-1", "full:k=1", "cacheblend:selected=[", "ape:temperature=hot", "Block"]


def tiny(folder: Path, *tuned_for: str) -> Path:
    demo.write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kvgraph": {"tuned_for": tuned_for}}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine) as url:
        yield url


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def over_http(url: str, engine: Engine, **kvgraph) -> httpx.Response:
    body = {"model": Settings(model=engine.model.name).name, "prompt": "?", "documents": [{"text": t} for t in TEXTS]}
    return httpx.post(f"{url}/v1/plan", json={**body, "kvgraph": kvgraph}, timeout=60)


def starts(plan) -> list[int]:
    return [span.start for span in plan.spans]


@pytest.mark.parametrize("spec", SPECS)
def test_all_ways_take_the_same(spec, engine, url, corpus, run):
    method = methods.parse(spec)
    graph = ContextGraph(TEXTS, "?")
    plan = engine.plan(graph, spec)
    assert plan == engine.plan(graph, method) == engine.plan(graph, methods.format(method))
    assert engine.encode(graph, spec).kv_bytes == engine.encode(graph, method).kv_bytes
    assert engine.score(graph, "!", spec).scores.tolist() == engine.score(graph, "!", method).scores.tolist()
    results = [
        engine.generate(graph, spec, max_tokens=2),
        *(c.result for c in engine.stream(graph, spec, max_tokens=2)),
    ]
    assert results[0].token_ids == results[-1].token_ids

    code, out, err = run("explain", engine.model.name, "--documents", corpus, "--template", "{text}", "--method", spec)
    assert code == 0 and int(re.search(r"highest position ([\d,]+)", out)[1]) == plan.highest_position, err

    sent = over_http(url, engine, method=spec).json()
    bare = engine.plan(ContextGraph([f"{text}\n\n" for text in TEXTS], "?"), spec)
    assert sent["method"] == method.name and len(sent["spans"]) in (len(bare.spans), len(bare.spans) + 1)
    fields = {k: v for k, v in methods.configuration(method).items() if k != "selected"}
    if method.name != "cacheblend":
        assert over_http(url, engine, method=method.name, **fields).json()["spans"] == sent["spans"]

    assert Settings.load(model="m", method=spec).method == spec
    component = Component("a", "world:hops", (spec,))
    Mixture([component], [open_source(component, "", None, 0, "train")], 0, length=9, limit=9)


@pytest.mark.parametrize("spec", WRONG)
def test_all_ways_refuse_the_same(spec, engine, url, corpus, run, tmp_path):
    graph = ContextGraph(TEXTS, "?")
    with pytest.raises(GraphError) as refused:
        methods.parse(spec)
    told = str(refused.value)
    for call in (engine.plan, engine.generate, engine.encode, lambda *words: next(engine.stream(*words))):
        with pytest.raises(GraphError, match=f"^{re.escape(told)}$"):
            call(graph, spec)
    with pytest.raises(GraphError, match=f"^{re.escape(told)}$"):
        engine.score(graph, "!", spec)
    code, _, err = run("explain", engine.model.name, "--documents", corpus, "--method", spec)
    assert code == 1 and told in err
    answer = over_http(url, engine, method=spec)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    file = tmp_path / "server.toml"
    file.write_text(f"model = 'm'\nmethod = '{spec}'\n")
    for load in (lambda: Settings.load(model="m", method=spec), lambda: Settings.load(config=file)):
        with pytest.raises(KVGraphError, match=re.escape(told[:60])):
            load()
    component = Component("a", "world:hops", (spec,))
    with pytest.raises(GraphError, match=re.escape(told)):
        Mixture([component], [open_source(component, "", None, 0, "train")], 0, length=9, limit=9)


@pytest.mark.parametrize(
    ("tuned_for", "default"),
    [((), "full"), (("pcw", "block"), "pcw"), (("unheard-of", "graph-kv-ego"), "graph-kv-ego")],
)
def test_no_method_is_the_same_default_everywhere(tuned_for, default, corpus, run, tmp_path):
    folder, method = tiny(tmp_path, *tuned_for), methods.get(default)
    graph = ContextGraph(TEXTS, "?")
    with Engine.load(folder, check=False) as engine:
        plan = engine.plan(graph)
        assert plan.method == method.name and plan == method.plan(graph.tokenized(engine.tokenize))
        assert (
            engine.generate(graph, max_tokens=1).usage.kv_bytes
            == engine.generate(graph, default, max_tokens=1).usage.kv_bytes
        )
        assert engine.encode(graph).kv_bytes == engine.encode(graph, method).kv_bytes
        with serve(engine) as url:
            assert over_http(url, engine).json()["method"] == method.name
            card = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]
            assert card["kvgraph"]["default_method"] == method.name
    words = ["--documents", corpus, "--template", "{text}"]
    outs = [run("explain", folder, *words, *more)[1] for more in ([], ["--method", default])]
    assert outs[0] == outs[1] and f"\n{method.name}: " in outs[0]
    asked = [
        run("ask", folder, "?", *words, "--json", "--no-check", "--max-tokens", 2, *more)
        for more in ([], ["--method", default])
    ]
    tokens = [json.loads(out)["usage"]["kv_bytes"] for _, out, _ in asked]
    assert tokens[0] == tokens[1]
    encoded = [
        run("encode", folder, corpus, "--template", "{text}", "--dry-run", "--no-check", *more)
        for more in ([], ["--method", default])
    ]
    assert encoded[0][0] == 0 and encoded[0][1].split("time")[0] == encoded[1][1].split("time")[0]


def test_every_method_and_preset_can_be_a_configuration(engine):
    graph = ContextGraph(TEXTS, "?")
    for name in (*METHODS, *PRESETS):
        if not name.startswith("kvlink-"):  # their ids are outside this model's vocabulary
            assert engine.encode(graph, name).graphs == 1
