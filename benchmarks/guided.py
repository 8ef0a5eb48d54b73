"""16 requests that decode together, without constraint and constrained to a JSON schema: tokens per second of all of them."""

from __future__ import annotations

import time
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from benchmarks.common import arguments, documents, engine_on, hf_model, ids, median, report, sync
from kvgraph import ContextGraph, Engine
from kvgraph.engine.guide import Grammar
from kvgraph.engine.sampling import SamplingParams

SCHEMA = {  # with no end before a request's last token
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["harbour", "lighthouse", "mill"]},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,12}$"}},
        },
        "required": ["name", "kind", "size", "tags"],
        "additionalProperties": False,
    },
}


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and merges learnt from numbers in words and digits, with as many ids as the model has rows."""
    made = tokenizers.Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ("".join(letters[n * p % 26] for p in (1, 7, 11, 13, 17, 19)) for n in range(1, 4000))
    made.train_from_iterator((f' "{word}": {n}, ' for n, word in enumerate(words)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def rate(engine: Engine, graphs: list[ContextGraph], params: SamplingParams, device: str) -> float:
    """Tokens per second of all requests together, after every first token."""
    requests = [engine.submit(engine.plan(graph, "block"), params) for graph in graphs]
    while not all(request.token_ids for request in requests):
        engine.step()
    done = sum(len(request.token_ids) for request in requests)
    sync(device)
    started = time.perf_counter()
    while engine.step():
        pass
    sync(device)
    seconds = time.perf_counter() - started
    for request in requests:
        if request.error is not None:
            raise request.error
        assert len(request.token_ids) == params.max_tokens
    return (sum(len(request.token_ids) for request in requests) - done) / seconds


def main() -> None:
    args = arguments(__doc__, requests=16, new=32, repeats=5)
    hf = hf_model(args.device)
    engine = engine_on(hf)
    engine.model.tokenizer = tokenizer(engine.model.vocab_size)
    base = documents(2, 200, 30)
    graphs = [base.with_query(ids(30, 20_000 + i)) for i in range(args.requests)]
    engine.encode(base, "block")
    common: dict[str, Any] = {"max_tokens": args.new, "ignore_eos": True}
    sides = {}
    for kind, sampling in (("greedy", {}), ("drawn", {"temperature": 1.0, "seed": 0})):
        sides[f"{kind}, free"] = SamplingParams(**common, **sampling)
        sides[f"{kind}, guided"] = SamplingParams(**common, **sampling, grammar=Grammar.json_schema(SCHEMA))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(args.repeats + 1):
        for name, params in sides.items():
            found = rate(engine, graphs, params, args.device)
            if round_:
                rates[name].append(found)
    middle = {name: median(found) for name, found in rates.items()}
    report(
        f"{args.requests} requests, {args.new} tokens each, vocabulary of {len(engine.model.tokenizer)}",
        [{"side": name, "tokens/s": value} for name, value in middle.items()],
        args,
        {
            f"{kind}, guided / free": (middle[f"{kind}, guided"] / middle[f"{kind}, free"], ">= 0.8")
            for kind in ("greedy", "drawn")
        },
    )


if __name__ == "__main__":
    main()
