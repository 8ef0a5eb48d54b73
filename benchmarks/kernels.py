"""Attention of one decoding token over separate spans on a CPU: the compiled kernel beside PyTorch's fused one, a call for each span.

Nine query heads and three key/value heads of 64, as in SmolLM2-135M. Every call has another layer's KV, as in a step, so that it
comes from memory and not from the processor's cache.
"""

from __future__ import annotations

import time

import torch

from benchmarks.common import arguments, median, report
from kvgraph.attention.backends import compiled, cpu
from kvgraph.attention.backends.base import Part

HEADS, GROUPS, DIM = 9, 3, 64
TOKENS = 480_000  # of all layers: more than a cache holds
CASES = [  # spans, tokens of each, dtype
    (10, 400, torch.bfloat16),
    (10, 400, torch.float32),
    (1, 4000, torch.bfloat16),
    (10, 3200, torch.bfloat16),
]


def main() -> None:
    args = arguments(__doc__, repeats=15)
    rows = []
    for spans, length, dtype in CASES:
        count = TOKENS // (spans * length)
        kv = torch.randn(count, spans, 2, GROUPS, length, DIM).to(dtype)
        q = torch.randn(HEADS, spans, DIM)
        layers = [[Part(slice(i, i + 1), k, v) for i, (k, v) in enumerate(layer)] for layer in kv]
        found: dict[bool, list[float]] = {True: [], False: []}
        for ours in [True, False] * args.repeats:
            cpu.compiled = (lambda: compiled) if ours else (lambda: None)  # type: ignore[assignment]
            started = time.perf_counter()
            for parts in layers:
                cpu.attend(q, parts, DIM**-0.5)
            found[ours].append((time.perf_counter() - started) / count)
        mine, torchs = (median(found[ours][1:]) * 1e6 for ours in (True, False))  # without the first, which compiles
        rows.append(
            {
                "spans": spans,
                "tokens of each": length,
                "dtype": str(dtype).removeprefix("torch."),
                "compiled µs": mine,
                "PyTorch µs": torchs,
                "ratio": torchs / mine,
                "compiled, GB/s of KV": kv[0].numel() * dtype.itemsize / mine / 1e3,
            }
        )
    report("Attention of one decoding token in one layer, on a CPU", rows, args, {})


if __name__ == "__main__":
    main()
