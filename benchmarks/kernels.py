"""Attention over separate spans on a CPU, of one decoding token, a question, or a whole chunk of a prefill: the kernels that Numba
compiles beside PyTorch's fused one, a call for each span.

Nine query heads and three key/value heads of 64, as in SmolLM2-135M. Every call has another layer's KV, as in a step, so that it
comes from memory and not from the processor's cache.
"""

from __future__ import annotations

import time

import torch

from benchmarks.common import arguments, median, report
from kvgraph.attention.backends import cpu
from kvgraph.attention.backends.base import Part

HEADS, GROUPS, DIM = 9, 3, 64
TOKENS = 480_000  # of all layers: more than a cache holds
CASES = [  # tokens that attend, spans, tokens of each, dtype; a span of as many tokens is the chunk itself
    (1, 10, 400, torch.bfloat16),
    (1, 10, 400, torch.float32),
    (1, 1, 4000, torch.bfloat16),
    (1, 10, 3200, torch.bfloat16),
    (30, 10, 400, torch.bfloat16),
    (30, 10, 3200, torch.bfloat16),
    (512, 1, 512, torch.bfloat16),
    (512, 10, 400, torch.bfloat16),
]
OURS = cpu.compiled, cpu.halves


def main() -> None:
    args = arguments(__doc__, repeats=15)
    rows = []
    for tokens, spans, length, dtype in CASES:
        count = max(1, TOKENS // (spans * length * tokens))
        kv = torch.randn(count, spans, 2, GROUPS, length, DIM).to(dtype)
        q = torch.randn(HEADS, spans * tokens, DIM)
        columns = [slice(i * tokens, (i + 1) * tokens) for i in range(spans)]
        layers = [
            [Part(c, k, v, causal=1 < tokens == length) for c, (k, v) in zip(columns, layer, strict=True)]
            for layer in kv
        ]
        found: dict[bool, list[float]] = {True: [], False: []}
        for ours in [True, False] * args.repeats:
            cpu.compiled, cpu.halves = OURS if ours else (lambda: None, lambda: None)  # type: ignore[assignment]
            started = time.perf_counter()
            for parts in layers:
                cpu.attend(q, parts, DIM**-0.5)
            found[ours].append((time.perf_counter() - started) / count)
        mine, torchs = (median(found[ours][1:]) * 1e6 for ours in (True, False))  # without the first, which compiles
        rows.append(
            {
                "tokens": tokens,
                "spans": spans,
                "tokens of each": length,
                "dtype": str(dtype).removeprefix("torch."),
                "compiled µs": mine,
                "PyTorch µs": torchs,
                "ratio": torchs / mine,
                "compiled, GB/s of KV": kv[0].numel() * dtype.itemsize / mine / 1e3,
                "compiled, Gflop/s": 4 * HEADS * DIM * spans * length * tokens / mine / 1e3 / (1 + layers[0][0].causal),
            }
        )
    report("Attention in one layer, on a CPU", rows, args, {})


if __name__ == "__main__":
    main()
