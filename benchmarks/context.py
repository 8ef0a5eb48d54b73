"""TTFT as the context grows from 1k to 32k tokens, kvgraph warm against full prefill: a table, a plot, and peak memory."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, documents, engine_on, hf_model, interleaved, median, report
from benchmarks.ttft import prefill


def main() -> None:
    args = arguments(__doc__, length=400, query=30, repeats=3, largest=32768, plot="docs/images/ttft-context.png")
    hf: Any = hf_model(args.device)
    engine = engine_on(hf)
    rows = []
    size = 1024
    while size <= args.largest:
        graph = documents(round(size / args.length), args.length, args.query)
        flat = [t for s in graph.segments for t in s]
        engine.warm(graph, "block")
        before = peak()
        ours = interleaved(
            {"kvgraph": lambda g=graph: engine.generate(g, "block", max_tokens=1)}, args.repeats, args.device
        )
        grown = peak() - before
        tokens = [*flat, *graph.query]
        if size > 8192:  # one repetition, no warm-up: it takes minutes
            theirs = interleaved_once(lambda t=tokens: prefill(hf, t))
        else:
            theirs = median(interleaved({"full": lambda t=tokens: prefill(hf, t)}, args.repeats, args.device)["full"])
        mine = median(ours["kvgraph"])
        rows.append({
            "context tokens": len(flat), "kvgraph ms": mine * 1e3, "full prefill ms": theirs * 1e3, "speed-up": theirs / mine,
            "KV MB": engine.scheduler.pool.bytes / 1e6, "scratch MB": grown / 1e6,
        })  # fmt: skip
        print(rows[-1], flush=True)
        engine.scheduler.pool.evict_to(0)
        size *= 2
    report("Time to first token as the context grows", rows, args)
    plot(rows, Path(args.plot))


def interleaved_once(run: Any) -> float:
    import time

    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = [r["context tokens"] for r in rows]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, label, color in (
        ("full prefill ms", "full prefill (Hugging Face)", "#b4552d"),
        ("kvgraph ms", "kvgraph, warm", "#1f6f8b"),
    ):
        axes.plot(x, [r[name] for r in rows], marker="o", color=color, label=label)
        for xi, r in zip(x, rows, strict=True):
            value = r[name] / 1e3
            axes.annotate(
                f"{value:.2g} s" if value < 10 else f"{value:.0f} s",
                (xi, r[name]),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
                color=color,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context tokens",
        ylabel="time to first token (ms)",
        title="Time to first token, 124 M Llama, one CPU thread",
    )
    axes.set_xticks(x, [f"{v / 1000:.1f}k" for v in x], minor=False)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
