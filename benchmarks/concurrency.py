"""16 concurrent requests on the same 10 documents: KV memory, aggregate decode rate, and one request against HF generate."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import arguments, documents, engine_on, hf_model, ids, median, report, sync
from benchmarks.ttft import crop
from kvgraph import ContextGraph, Engine
from kvgraph.engine.sampling import SamplingParams


def decode_rate(engine: Engine, graphs: list[ContextGraph], new: int, device: str) -> tuple[float, int]:
    """Tokens per second of all requests together after every first token, and the peak KV bytes (capacity)."""
    engine.scheduler.peak_bytes = 0
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    requests = [engine.submit(engine.plan(g, "block"), params) for g in graphs]
    while not all(r.token_ids for r in requests):
        engine.step()
    done = sum(len(r.token_ids) for r in requests)
    sync(device)
    started = time.perf_counter()
    while engine.step():
        pass
    sync(device)
    seconds = time.perf_counter() - started
    return (sum(len(r.token_ids) for r in requests) - done) / seconds, engine.scheduler.peak_bytes


@torch.inference_mode()
def hf_rate(hf: Any, context: list[int], cache: DynamicCache, query: list[int], new: int, device: str) -> float:
    """The decode rate of HF generate over the same context, which is already in its cache: the time of `new` tokens minus that
    of one."""
    tokens = torch.tensor([[*context, *query]], device=hf.device)

    def run(n: int) -> float:
        crop(cache, len(context))
        sync(device)
        started = time.perf_counter()
        out = hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        sync(device)
        assert out.shape[1] == tokens.shape[1] + n
        return time.perf_counter() - started

    return (new - 1) / (run(new) - run(1))


def main() -> None:
    args = arguments(__doc__, documents=10, length=400, query=30, requests=16, new=16, repeats=5)
    hf = hf_model(args.device)
    base = documents(args.documents, args.length, args.query)
    graphs = [base.with_query(ids(args.query, 20_000 + i)) for i in range(args.requests)]
    engine = engine_on(hf)
    engine.encode(base, "block")
    flat = [t for s in base.segments for t in s]
    cache = DynamicCache()
    with torch.inference_mode():
        hf(torch.tensor([flat], device=hf.device), past_key_values=cache, logits_to_keep=1)
    figures: dict[str, list[float]] = {"one": [], "many": [], "HF generate": []}
    memory = {}
    for round_ in range(args.repeats + 1):
        one, memory["one"] = decode_rate(engine, graphs[:1], args.new, args.device)
        theirs = hf_rate(hf, flat, cache, list(base.query), args.new, args.device)
        many, memory["many"] = decode_rate(engine, graphs, args.new, args.device)
        if round_:
            for name, value in (("one", one), ("many", many), ("HF generate", theirs)):
                figures[name].append(value)
    rows = [
        {"side": "kvgraph, 1 request", "tokens/s": median(figures["one"]), "peak KV MB": memory["one"] / 1e6},
        {
            "side": f"kvgraph, {args.requests} requests",
            "tokens/s": median(figures["many"]),
            "peak KV MB": memory["many"] / 1e6,
        },
        {"side": "HF generate, 1 request", "tokens/s": median(figures["HF generate"]), "peak KV MB": ""},
    ]
    one, many = median(figures["one"]), median(figures["many"])
    report(
        f"Decoding {args.new} tokens over the same {args.documents} documents x {args.length} tokens",
        rows,
        args,
        {
            f"KV memory of {args.requests} requests / of one": (memory["many"] / memory["one"], "<= 1.2"),
            f"aggregate rate of {args.requests} / of one": (many / one, ">= 3"),
            "one request / HF generate": (one / median(figures["HF generate"]), ">= 0.95"),
        },
    )


if __name__ == "__main__":
    main()
