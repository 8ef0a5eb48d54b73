"""TTFT as the context grows from 1k to 32k tokens, kvgraph warm against full prefill: a table, a plot, and peak memory.

The sides run one after the other at each size; above 8k tokens full prefill runs once. Scratch is the peak of memory use
above its level before the run, without the KV that is kept.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, documents, engine_on, hf_model, interleaved, median, report, sync
from benchmarks.ttft import prefill


def main() -> None:
    args = arguments(__doc__, length=400, query=30, repeats=3, largest=32768, plot="docs/images/ttft-context.png")
    hf: Any = hf_model(args.device)
    engine = engine_on(hf)
    rows = []
    size = 1024
    while size <= args.largest:
        graph = documents(round(size / args.length), args.length, args.query)
        tokens = [t for s in (*graph.segments, graph.query) for t in s]
        cold, cold_scratch = measured(lambda g=graph: engine.encode(g, "block"), 1, args.device)
        warm, warm_scratch = measured(
            lambda g=graph: engine.generate(g, "block", max_tokens=1), args.repeats, args.device
        )
        # Above 8k one repetition: it takes minutes.
        full, full_scratch = measured(lambda t=tokens: prefill(hf, t), 1 if size > 8192 else args.repeats, args.device)
        kv = engine.scheduler.memory.pool.bytes
        rows.append({
            "context tokens": len(tokens) - args.query, "kvgraph ms": warm * 1e3, "full prefill ms": full * 1e3,
            "speed-up": full / warm, "encoding once ms": cold * 1e3, "KV MB": kv / 1e6, "kvgraph scratch MB": warm_scratch / 1e6,
            "encoding scratch MB": (cold_scratch - kv) / 1e6, "full prefill scratch MB": full_scratch / 1e6,
        })  # fmt: skip
        print(rows[-1], flush=True)
        engine.scheduler.memory.pool.evict_to(0)
        size *= 2
    report("Time to first token as the context grows", rows, args)
    plot(
        rows,
        Path(args.plot),
        "124 M Llama, one CPU thread" if args.device == "cpu" else "8B-shaped Llama, bf16, " + args.device,
    )


def measured(run: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """The median seconds of `repeats` runs (after a warm-up, if there are several), and their peak bytes."""
    before = reset_peak(device)
    if repeats > 1:
        seconds = median(interleaved({"run": run}, repeats, device)["run"])
    else:
        sync(device)
        started = time.perf_counter()
        run()
        sync(device)
        seconds = time.perf_counter() - started
    return seconds, peak(device) - before


def reset_peak(device: str) -> int:
    """Reset the peak; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps for later would hide the run's own
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    return status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def status(field: str) -> int:
    """A size in bytes from Linux's /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def plot(rows: list[dict[str, Any]], path: Path, what: str) -> None:
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
        title=f"Time to first token, {what}",
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
