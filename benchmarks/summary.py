"""Write benchmarks/RESULTS.md from the JSON files in benchmarks/results/, each made by the command it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.common import text

HERE = Path(__file__).parent
ORDER = [
    "ttft",
    "cpu",
    "kernels",
    "start",
    "concurrency",
    "encoding",
    "context",
    "precision",
    "codecs",
    "in_place",
    "tiers",
    "reading",
    "records",
    "kvpress_reference",
    "cold",
    "serving",
    "evaluation",
    "corpus",
    "corpus_python",
    "edges",
    "quality",
    "training",
    "cluster_sim",
    "cluster",
    "cluster_encoding",
    "world",
]


def section(found: dict[str, Any]) -> list[str]:
    """One benchmark as Markdown: title, command, environment, table, goals."""
    environment = found["environment"]
    lines = [f"## {found['title']}", "", f"`{environment['command'].strip()}`", ""]
    lines.append(
        f"{environment['hardware']}, {environment['threads']} thread(s); Python {environment['python']}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}."
    )
    if environment.get("load", 0) > environment.get("cores", 0) + 1:  # in the five minutes before the end
        lines[-1] += (
            f" Other work ran beside it: {environment['load']} processes wanted {environment['cores']} cores, so times "
            "compare within this table alone."
        )
    lines += ["", *(world.markdown(found) if "cells" in found else _table(found["rows"]))]
    if found["goals"]:
        lines += ["", "| figure | measured | goal |", "|---|---|---|"]
        lines += [f"| {name} | {text(value)} | {goal} |" for name, (value, goal) in found["goals"].items()]
    return [*lines, ""]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row.get(c, "")) for c in columns) + " |" for row in rows]


GPU = [  # (what, part, figure, goal)
    ("warm TTFT, 32 documents × 1,000 tokens + 50, KV on the device, ms", "ttft", "kvgraph warm ms", "≤ 20"),
    ("the same without CUDA graphs, ms", "ttft", "kvgraph warm, without CUDA graphs ms", ""),
    ("limit: bytes of the weights and the documents' KV over the copy rate, ms", "ttft", "bytes limit ms", ""),
    ("full prefill by Hugging Face (SDPA), ms", "ttft", "Hugging Face full prefill ms", ""),
    ("limit: its operations over the matrix rate, ms", "ttft", "operations limit of the full prefill ms", ""),
    ("decoding at 32k context, 1 row, ms a step", "decode", "1 rows: ms a step", ""),
    ("share of the weight-bandwidth limit", "decode", "share of the weight-bandwidth limit", "≥ 0.5"),
    ("decoding, 16 rows on the same documents, ms a step", "decode", "16 rows: ms a step", ""),
    ("tokens/s of 16 rows / of one", "decode", "16 rows / one row", "≥ 10"),
    ("decoding at 32k context by Hugging Face (dynamic cache), ms a token", "hugging_face", "ms a token", ""),
    ("encoding documents of 500 tokens, share of the matrix rate", "encode", "share of the matrix rate", "≥ 0.6"),
    ("encoding, tokens/s", "encode", "tokens/s", ""),
    ("1B shape: graph-kv, 2 rounds over 200 chunks, cold / flat prefill of as many tokens", "levels", "graph-kv / flat", "≤ 1.3"),
    ("matrix rate, 8192³ in bf16, TFLOP/s", "limits", "matrix TFLOP/s", ""),
    ("copy rate on the device (read + written), TB/s", "limits", "device copy TB/s (read + written)", ""),
]  # fmt: skip


def gpu() -> list[str]:
    """The figures of one GPU, before and after the kernels and CUDA graphs of `kvgraph.attention.cuda`."""
    before, after = (json.loads((HERE / f"results/{name}.json").read_text()) for name in ("gpu-before", "gpu"))
    environment = after["environment"]
    lines = [
        "## One GPU: an 8B-shaped Llama in bf16", "",
        f"`{environment['command']}`", "",
        f"{environment['card']}; Python {environment['python']}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}. Random weights; correctness was checked beside other work on the same card. \"Before\" is the same script on the version that ran attention in",
        "IEEE float32, one kernel after another; the profiles of both are in the JSON files.", "",
        "| figure | before | now | goal |", "|---|--:|--:|---|",
    ]  # fmt: skip
    for what, part, figure, goal in GPU:
        old, new = before.get(part, {}).get(figure), after.get(part, {}).get(figure)
        lines.append(f"| {what} | {'' if old is None else text(old)} | {'' if new is None else text(new)} | {goal} |")
    worst = {"bfloat16": after["correct"], **after["dtypes"]}
    lines += [
        "",
        "Largest difference of next-token logits from a dense forward by transformers' attention, in standard",
        "",
    ]
    lines[-2] += " deviations, over seven methods, cold and warm: " + ", ".join(
        f"{name} {max(v for k, v in found.items() if isinstance(v, float) and 'seconds' not in k):.2g}"
        for name, found in worst.items() if isinstance(found, dict)
    ) + ". No step waited for the device."  # fmt: skip
    return lines


def main() -> None:
    files = sorted(
        (f for f in (HERE / "results").glob("*.json") if not f.stem.startswith("gpu")),
        key=lambda f: (ORDER.index(f.stem) if f.stem in ORDER else 99, f.stem),
    )
    lines = [
        "# Results",
        "",
        "`make bench` makes this page. Every section names its command. Figures are medians, and all sides of a table are measured",
        "in one run. Clocks start after the model is loaded, from token ids. The model is a random Llama of 124 M parameters in",
        "float32, with these exceptions: the table of precisions has a tiny random model for each family; serving and evaluation",
        "use a tiny random model; training and the synthetic world name their models; the tables of SmolLM2 are in bfloat16 or",
        "quantised, and that of `kvgraph ask` counts from the shell prompt. Routing to replicas is a simulation: it runs no model",
        "and takes its durations from other sections.",
        "",
    ]
    for file in files:
        lines += section(json.loads(file.read_text()))
        if file.stem == "cluster_sim":
            lines += ["![Routing policies by the number of replicas, simulated](../docs/images/cluster-sim.png)", ""]
        if file.stem == "context":
            lines += ["![Time to first token as the context grows](../docs/images/ttft-context.png)", ""]
    lines += gpu()
    (HERE / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
