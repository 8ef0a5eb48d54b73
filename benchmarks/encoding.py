"""Encoding 64 documents of 50-200 tokens: kvgraph's packed steps, one HF forward each, HF's padded batch; no logits."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import arguments, engine_on, hf_model, ids, interleaved, median, report
from kvgraph import ContextGraph


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, documents=64, shortest=50, longest=200, repeats=5)
    hf: Any = hf_model(args.device)
    lengths = [random.Random(i).randint(args.shortest, args.longest) for i in range(args.documents)]
    docs = [ids(n, i) for i, n in enumerate(lengths)]
    graphs = [ContextGraph([d], query=[1]) for d in docs]
    device = hf.device

    def each() -> None:
        for doc in docs:
            hf.model(torch.tensor([doc], device=device), past_key_values=DynamicCache(), use_cache=True)

    def padded() -> None:
        longest = max(lengths)
        tokens = torch.tensor([d + [0] * (longest - len(d)) for d in docs], device=device)
        mask = torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        hf.model(tokens, attention_mask=mask.long(), past_key_values=DynamicCache(), use_cache=True)

    def ours() -> None:
        engine.scheduler.memory.pool.evict_to(0)
        assert engine.encode(graphs, "block", progress=False).computed_tokens == sum(lengths)

    engine = engine_on(hf)

    times = interleaved(
        {"kvgraph": ours, "HF, one forward each": each, "HF, padded batch": padded}, args.repeats, args.device
    )
    ours_time = median(times["kvgraph"])
    rows = [
        {"side": n, "median s": median(t), "tokens/s": sum(lengths) / median(t), "vs kvgraph": median(t) / ours_time}
        for n, t in times.items()
    ]
    report(
        f"Encoding {args.documents} documents of {args.shortest}-{args.longest} tokens, {sum(lengths):,} in all",
        rows,
        args,
        {
            "one HF forward each / kvgraph": (rows[1]["vs kvgraph"], ">= 1.0"),
            "HF padded batch / kvgraph": (rows[2]["vs kvgraph"], ">= 1.3"),
        },
    )


if __name__ == "__main__":
    main()
