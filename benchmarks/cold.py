"""Many pieces, cold, against as many tokens in one piece: messages of a chat over HTTP, and graphs in the engine.

The two sides of a case take turns, and no text comes twice. The model is the demo's tiny one, whose own work is small, so that
all the rest shows.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks.common import arguments, median, report
from benchmarks.serving import server
from kvgraph import ContextGraph, Engine, demo
from kvgraph.edges import chain
from kvgraph.engine.sampling import SamplingParams

CHATS = {41: 1.2, 1001: 1.5}  # messages, and the goal
WORDS = ("time", "people", "water", "house", "world", "school", "night", "place", "story", "music")
MESSAGE = 1  # words
QUERY = 9  # tokens
GRAPHS: dict[str, tuple[str, int, int, Callable[[int], list[tuple[int, int]]], float]] = {
    # what: method, documents, tokens of each, edges, and the goal
    "a chain of 40 documents × 22": ("full", 40, 22, lambda n: [], 1.2),
    "a chain of 40 documents × 200": ("full", 40, 200, lambda n: [], 1.2),
    "a chain of 1,000 documents × 10": ("full", 1000, 10, lambda n: [], 1.5),
    "graph-kv, 3 rounds over a chain of 40 × 50": ("graph-kv:rounds=3", 40, 50, chain, 1.3),
    "graph-kv, 2 rounds over 200 × 20, the two before": (
        "graph-kv:rounds=2", 200, 20, lambda n: [(i - j, i) for i in range(n) for j in (2, 1) if i >= j], 1.3,
    ),
}  # fmt: skip


def asked(url: str, texts: list[str]) -> tuple[float, int]:
    """Seconds that a chat of these messages takes up to its first token, and how many tokens it has."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    started = time.perf_counter()
    body = {"model": "model", "messages": turns, "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    return time.perf_counter() - started, answer.json()["usage"]["prompt_tokens"]


def chats(url: str, messages: int, repeats: int, rng: random.Random) -> tuple[float, float, int]:
    """Median seconds of a chat of many messages, and of one of a single message with as many tokens."""
    around = asked(url, ["a"])[1] - 1  # tokens of the template; each byte of a text is one
    many, one, tokens = [], [], 0
    for round_ in range(repeats + 1):
        texts = [f"{rng.random()}"] + [" ".join(rng.choices(WORDS, k=MESSAGE)) for _ in range(messages - 1)]
        took, tokens = asked(url, texts)
        text = f"{rng.random()} " + " ".join(rng.choices(WORDS, k=tokens))
        whole, same = asked(url, [text[: tokens - around]])
        assert same == tokens
        if round_:
            many.append(took)
            one.append(whole)
    return median(many), median(one), tokens


def graphs(engine: Engine, case: str, repeats: int, rng: random.Random) -> tuple[float, float, int]:
    """Median seconds of a graph, and of one piece with as many tokens as the graph's spans have."""
    method, count, length, edges, _ = GRAPHS[case]

    def ids(n: int) -> list[int]:
        return [rng.randrange(20, 270) for _ in range(n)]

    def seconds(graph: ContextGraph, method: str) -> tuple[float, int]:
        started = time.perf_counter()
        plan = engine.plan(graph, method)
        engine.wait(engine.submit(plan, SamplingParams(max_tokens=1)))
        return time.perf_counter() - started, sum(len(span) for span in plan.spans)

    many, one, tokens = [], [], 0
    for round_ in range(repeats + 1):
        took, tokens = seconds(
            ContextGraph([ids(length) for _ in range(count)], ids(QUERY), edges=edges(count)), method
        )
        whole, _ = seconds(ContextGraph([], ids(QUERY), prefix=[ids(tokens - QUERY)]), "full")
        if round_:
            many.append(took)
            one.append(whole)
    return median(many), median(one), tokens


def main() -> None:
    args = arguments(__doc__, repeats=3)
    warnings.simplefilter("ignore")  # the model is tuned for nothing
    rng, cases = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        demo.write_model(Path(folder))
        with server(Path(folder), args.threads) as url:
            for messages, goal in CHATS.items():
                cases.append((f"a chat of {messages:,} messages", goal, chats(url, messages, args.repeats, rng)))
        with Engine.load(folder, check=False) as engine:
            for case, (*_, goal) in GRAPHS.items():
                cases.append((case, goal, graphs(engine, case, args.repeats, rng)))
    report(
        "Many pieces, cold, against one piece of as many tokens",
        [
            {
                "case": case,
                "tokens": tokens,
                "pieces s": many,
                "one piece s": one,
                "ratio": many / one,
                "goal": f"≤ {goal}",
            }
            for case, goal, (many, one, tokens) in cases
        ],
        args,
    )


if __name__ == "__main__":
    main()
