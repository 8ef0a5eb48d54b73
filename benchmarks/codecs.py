"""The savings and costs of every codec and of every share of tokens kept: bytes, time, logits, answers about a synthetic
world, and real text.

Sizes and times are for documents of a random 124 M model in bfloat16, in files on this machine's disk. Load times cover
reading, checking and unpacking a record whose file is in the page cache. Logits and answers are those of the world model in
float32 with `block`, on worlds it wasn't trained on. The likelihood is that of the right answer's tokens. A selection keeps
whole numbers of fewer tokens; its "pack" is the choice of these tokens, by random queries. Text is that of the demo's
articles: SmolLM2 with the shipped adapter reads an article's first half and others from stored KV, and each token of the
second half is scored.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch

from benchmarks.common import SMALL, LlamaConfig, LlamaForCausalLM, arguments, ids, median, report
from kvgraph import ContextGraph, Engine, SamplingParams, demo, models
from kvgraph.models import adapters
from kvgraph.store.codecs.registry import packed, parse
from kvgraph.store.disk import DiskStore
from kvgraph.store.selection.base import selected
from kvgraph.store.selection.registry import SELECTIONS, parse_selection
from kvgraph.train.mixture import WorldSource

SPECS = ("raw", "zstd", "fp8", "int8", "kivi", "kivi+zstd", "gear", "kivi:bits=2", "gear:bits=2")
SELECTED = tuple(f"{name}:keep={keep}" for name in SELECTIONS for keep in (75, 50, 25))
SEED = 20_261
BESIDE = 3  # other articles that are read with one


def sizes(spec: str, model: models.Model, records: list[Any], tokens: int, folder: str) -> dict[str, float]:
    """Bytes of 1,000 tokens on disk, and the seconds for packing, writing and loading them."""
    selection = parse_selection(spec) if spec in SELECTED else None
    codec, store = parse("raw" if selection else spec), DiskStore(folder, fingerprint=spec)
    pack, load = [], []
    heads = model.hf.config.num_attention_heads
    queries = [torch.randn(heads, min(32, len(records[0])), layer.key_dim) for layer in model.layers]
    for record in records:
        started = time.perf_counter()
        kept = selected(record, selection, queries) if selection else record if spec == "raw" else packed(record, codec)
        pack.append(time.perf_counter() - started)
        store.put(kept)
    size = sum(entry.size for entry in store.ls())
    for record in records:
        started = time.perf_counter()
        found = DiskStore(folder, fingerprint=spec).get(record.key)
        assert found is not None
        load.append(time.perf_counter() - started)
    return {
        "MB / 1,000 tokens": size / tokens / 1e3,
        "smaller": model.kv_bytes_per_token * tokens / size,
        "pack ms / 1,000": median(pack) * 1e6 / (tokens / len(records)),
        "load ms / 1,000": median(load) * 1e6 / (tokens / len(records)),
    }


def option(spec: str) -> dict[str, str]:
    """Of an engine: a codec or a selection."""
    return {"select": spec} if spec in SELECTED else {"codec": spec}


def answers(spec: str, world: models.Model, source: WorldSource, corpora: int) -> tuple[float, float, torch.Tensor]:
    """The mean negative log-likelihood of an answer's tokens, the accuracy, and the logits after every query."""
    with Engine(world, kv_budget=1 << 30, **option(spec)) as engine:
        requests, queries = [], []
        for number in range(corpora):
            example = source[number]
            for question in example.questions:
                graph = ContextGraph(example.graph.segments, question.query, example.graph.prefix)
                requests.append((graph, question.answer))
                queries.append(graph)
        found = dict(engine.run(engine.prepare_score(graph, answer, "block") for graph, answer in requests))
        results = [found[i] for i in range(len(requests))]
        assert all(hasattr(r, "scores") for r in results), results
        nll = -sum(float(r.scores.sum()) for r in results) / sum(len(r.scores) for r in results)
        right = sum(r.greedy for r in results) / len(results)
        first = engine.generate(queries, "block", SamplingParams(max_tokens=1), first_logits=True)
    return nll, right, torch.stack([r.first_logits for r in first])


def text_nats(spec: str, model: models.Model) -> float:
    """The mean negative log-likelihood of the tokens of every article's second half, in nats."""
    texts = [model.tokenizer(f"{d.text}\n\n", add_special_tokens=False).input_ids for d in demo.documents()]
    with Engine(model, kv_budget=1 << 30, **option(spec)) as engine:
        scores = []
        for i, text in enumerate(texts):
            half = len(text) // 2
            beside = [texts[(i + n) % len(texts)] for n in range(1, BESIDE + 1)]
            graph = ContextGraph([*beside, text[:half]], [text[half]])
            scores.append(engine.score(graph, text[half + 1 :], "block").scores)
    return -float(torch.cat(scores).mean())


def main() -> None:
    args = arguments(__doc__, documents=6, length=500, corpora=24, model="")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = models.wrap(LlamaForCausalLM(LlamaConfig(**SMALL)).eval())
    torch.set_default_dtype(default)
    world = models.load(args.model or str(demo.model()), dtype="float32")
    source = WorldSource("hops", world.tokenizer, SEED, held_out=True)
    real = models.load(adapters.base_of(demo.adapter()), adapter=demo.adapter())
    with Engine(model, kv_budget=1 << 31) as engine:
        graph = ContextGraph([ids(args.length, i) for i in range(args.documents)], query=[5])
        engine.encode(graph, "block", progress=False)
        keys = [key for key in engine.keys(engine.plan(graph, "block")) if key is not None]
        records = [engine.scheduler.memory.pooled(key) for key in keys]
    rows, exact = [], None
    for spec in (*SPECS, *SELECTED):
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {
                "codec or selection": spec,
                **sizes(spec, model, records, args.documents * args.length, folder),
            }
        nll, right, logits = answers(spec, world, source, args.corpora)
        exact = logits if exact is None else exact
        row["logit error"] = float(((logits - exact).abs().amax(1) / exact.std(1)).median())
        rows.append(row | {"answer NLL": nll, "accuracy %": 100 * right, "text nats": text_nats(spec, real)})
    by = {row["codec or selection"]: row for row in rows}
    goals = {
        "kivi is smaller than bf16": (by["kivi"]["smaller"], "3.5 or more"),
        "points lost by kivi": (by["raw"]["accuracy %"] - by["kivi"]["accuracy %"], "1 at most"),
        "kivi:bits=2 is smaller than bf16": (by["kivi:bits=2"]["smaller"], "6 or more"),
        "gear's logit error / kivi's": (by["gear"]["logit error"] / by["kivi"]["logit error"], "below 1"),
        "nats of text that kivi adds": (by["kivi"]["text nats"] - by["raw"]["text nats"], "0.05 at most"),
    }
    report(f"Codecs and selections; {len(logits)} questions", rows, args, goals)


if __name__ == "__main__":
    main()
