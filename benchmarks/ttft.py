"""Time to first token of 10 documents x 400 tokens and a 30-token query: full prefill, the floor, kvgraph warm.

The floor is a Hugging Face forward of the query over an already composed contiguous cache. kvgraph is timed from token ids to
the first token: plan, keys, look-up, composition, forward, sampling. From disk, each repetition is a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import arguments, documents, engine_on, hf_model, interleaved, median, report, sync


@torch.inference_mode()
def prefill(hf: Any, tokens: list[int], cache: DynamicCache | None = None, past: int = 0) -> torch.Tensor:
    """Next-token logits of a plain forward (only the last position's)."""
    device = hf.device
    positions = torch.arange(past, past + len(tokens), device=device)[None]
    out = hf(
        torch.tensor([tokens], device=device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    return out.logits[0, -1]


def crop(cache: DynamicCache, length: int) -> None:
    """Shorten a cache to `length` tokens (transformers counts the tokens to remove, as a negative number)."""
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


def main() -> None:
    args = arguments(__doc__, documents=10, length=400, query=30, repeats=7, child="")
    graph = documents(args.documents, args.length, args.query)
    if args.child:
        return child(args, graph)
    hf = hf_model(args.device)
    flat = [t for s in graph.segments for t in s]
    cache = DynamicCache()
    prefill(hf, flat, cache)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_on(hf, store=folder)
        engine.encode(graph, "block")
        before_layers: list[float] = []
        started = [0.0]
        engine.model.hf.model.layers[0].register_forward_pre_hook(
            lambda *_: before_layers.append(time.perf_counter() - started[0])
        )

        def floor() -> None:
            crop(cache, len(flat))
            prefill(hf, list(graph.query), cache, len(flat))

        def warm() -> None:
            started[0] = time.perf_counter()
            result = engine.generate(graph, "block", max_tokens=1)
            assert result.usage.document_tokens_computed == 0

        sides = {"full prefill": lambda: prefill(hf, [*flat, *graph.query]), "floor": floor, "kvgraph, memory": warm}
        times = interleaved(sides, args.repeats, args.device)
        compose = median(before_layers[1:])  # without the warm-up
        command = [sys.executable, "-m", "benchmarks.ttft", "--child", folder, "--device", args.device]
        command += [f"--{k}={getattr(args, k)}" for k in ("documents", "length", "query", "threads")]
        disk, memory = [], []
        for _ in range(args.repeats):
            answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert answer["document_tokens_computed"] == 0 and answer["reused"] == {"disk": len(flat)}, answer
            disk.append(answer["disk"])
            memory.append(answer["memory"])
    warm_time = median(times["kvgraph, memory"])
    rows = [
        {"side": n, "median ms": median(t) * 1e3, "best ms": min(t) * 1e3, "vs kvgraph": median(t) / warm_time}
        for n, t in times.items()
    ]
    rows.append(
        {
            "side": "kvgraph, new process: memory",
            "median ms": median(memory) * 1e3,
            "best ms": min(memory) * 1e3,
            "vs kvgraph": median(memory) / warm_time,
        }
    )
    rows.append(
        {
            "side": "kvgraph, new process: disk",
            "median ms": median(disk) * 1e3,
            "best ms": min(disk) * 1e3,
            "vs kvgraph": median(disk) / warm_time,
        }
    )
    rows.append(
        {
            "side": "of which before the first layer",
            "median ms": compose * 1e3,
            "best ms": min(before_layers[1:]) * 1e3,
            "vs kvgraph": compose / warm_time,
        }
    )
    report(
        f"Time to first token: {args.documents} documents x {args.length} tokens, query of {args.query}",
        rows,
        args,
        {
            "full prefill / kvgraph": (median(times["full prefill"]) / warm_time, ">= 50"),
            "kvgraph / floor": (warm_time / median(times["floor"]), "<= 1.10"),
            "share before the first layer runs": (compose / warm_time, "< 0.03"),
            "from disk / from memory, in a new process": (median(disk) / median(memory), "<= 1.3"),
        },
    )


def child(args: Any, graph: Any) -> None:
    """A new process on a warm disk store: the first request over these documents, then the same from memory."""
    hf = hf_model(args.device)
    engine = engine_on(hf, store=args.child)
    engine.generate(
        documents(1, 64, args.query, first=99), "block", max_tokens=1
    )  # the libraries' own first-call costs

    def timed() -> tuple[float, Any]:
        sync(args.device)
        started = time.perf_counter()
        usage = engine.generate(graph, "block", max_tokens=1).usage
        sync(args.device)
        return time.perf_counter() - started, usage

    disk, usage = timed()
    memory = median([timed()[0] for _ in range(3)])
    print(
        json.dumps(
            {
                "disk": disk,
                "memory": memory,
                "reused": usage.reused_tokens,
                "document_tokens_computed": usage.document_tokens_computed,
            }
        )
    )


if __name__ == "__main__":
    main()
