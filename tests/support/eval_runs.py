"""Made-up evaluation runs for the report: folders as `kvgraph eval` leaves them, with invented answers and times."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvgraph import methods
from kvgraph.eval import stats

METRICS = ("substring_em", "f1")
RIGHT, WRONG = "The harbour was dug by Ina Roe.", "It was dug long ago <b>by someone</b> | nobody knows"
# method -> (points over the item's own chance, tokens computed an item, seconds to first token)
METHODS: Mapping[str, tuple[float, int, float]] = {
    "full": (0.10, 4200, 0.92),
    "block": (-0.04, 60, 0.09),
    "graph-kv": (0.06, 120, 0.11),
    "pcw": (-0.12, 60, 0.08),
}


def write_run(
    folder: Path,
    *,
    task: str = "nq",
    method: str = "full",
    count: int = 120,
    chance: Callable[[int], float] = lambda i: 0.5,
    facts: Callable[[int], dict[str, Any]] = lambda i: {"gold_position": i % 10},
    kinds: tuple[str, ...] = ("bridge", "comparison"),
    ablation: str | None = None,
    cost: tuple[int, float] = (100, 0.1),
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write one run. chance: of item i to be answered right. changes: parts of the summary to replace."""
    # An item is as hard for every method, so that their scores go together as real ones do.
    hardness = [random.Random(f"{task} {i}").random() for i in range(count)]
    luck = random.Random(f"{task} {method} {ablation} {seed}")
    lines = []
    for i in range(count):
        right = 0.8 * hardness[i] + 0.2 * luck.random() < chance(i)
        computed = int(cost[0] * luck.uniform(0.8, 1.2))
        lines.append(
            {
                "id": f"{task}-{i}",
                "kind": kinds[i % len(kinds)] if kinds else "",
                "facts": facts(i),
                "cluster": f"{task}-{i}",
                "documents": [f"{task} page {i}.{d}" for d in range(4)],
                "edges": [],
                "prediction": RIGHT if right else WRONG,
                "extracted": RIGHT if right else WRONG,
                "golds": ["Ina Roe"],
                "scores": {"substring_em": float(right), "f1": 0.8 if right else round(0.4 * luck.random(), 3)},
                "usage": {"prompt_tokens": 4200, "plan_tokens": 4200, "live_tokens": 40, "probe_tokens": 0, "completion_tokens": 9, "kv_bytes": 1 << 20},
                "finish_reason": "stop",
                "timing": {
                    "queued": 0.01, "probe": 0.0, "ttft": cost[1] * luck.uniform(0.8, 1.4) + 0.01, "decode": 0.2,
                    "computed_tokens": computed, "document_tokens_computed": max(0, computed - 40),
                    "reused_tokens": {"memory": max(0, 4200 - computed)},
                },
            }
        )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(_summary(lines, task, method, ablation) | changes))
    return folder


def _summary(lines: list[dict[str, Any]], task: str, method: str, ablation: str | None) -> dict[str, Any]:
    def means(part: list[dict[str, Any]]) -> dict[str, Any]:
        keys = stats.clusters_of(part)
        return {m: stats.mean_interval([x["scores"][m] for x in part], keys)._asdict() for m in METRICS}

    def by(value: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        values = sorted({value(line) for line in lines})
        return {str(v): means([line for line in lines if value(line) == v]) for v in values}

    names = sorted(lines[0]["facts"])
    computed = sum(line["timing"]["computed_tokens"] for line in lines)
    chosen = methods.parse(method)
    return {
        "format": 1,
        "task": task,
        "headline": METRICS[0],
        "metrics": list(METRICS),
        "method": {"spec": method, "name": chosen.name, "fields": {}},
        "model": {"name": "models/made-up", "fingerprint": "0f" * 32, "dtype": "bfloat16", "layers": 16},
        "seed": 0,
        "limit": None,
        "data": {"from": f"data/{task}.jsonl", "sha256": "ab" * 32, "shuffled": False, "items": len(lines)},
        "items_sha256": "cd" * 32,
        "prompt": {
            "instruction": "Here are documents.\n",
            "question": "{question}\nAnswer:",
            "document": "{title}\n{text}\n\n",
            "chat_template": True,
            "chat_template_sha256": "ef" * 32,
        },
        "decode": {"temperature": 0.0, "max_tokens": 100, "stop": []},
        "extract": "",
        "edges": "all" if chosen.name == "graph-kv" else None,
        "ablation": ablation,
        "scores": means(lines),
        "by": {"kind": by(lambda line: line["kind"]), **{n: by(lambda line, n=n: line["facts"][n]) for n in names}},
        "sets": {},
        "errors": 0,
        "finish": {"stop": len(lines)},
        "tokens": {
            "prompt": 4200 * len(lines),
            "plan": 4200 * len(lines),
            "live": 40 * len(lines),
            "probe": 0,
            "completion": 9 * len(lines),
        },
        "timing": {
            "seconds": 60.0,
            "items": len(lines),
            "items_per_second": len(lines) / 60,
            "queued": 0.01,
            "ttft": statistics.median(line["timing"]["ttft"] for line in lines),
            "decode": 0.2,
            "tokens": {"computed": computed, "documents_computed": computed, "reused": {"memory": 0}},
        },
        "environment": {
            "versions": {"kvgraph": "0.1.0", "python": "3.12.0", "torch": "2.13.0"},
            "git_commit": "1234567",
            "machine": "Linux x86_64, 8 CPU cores",
            "threads": 8,
            "kv_budget": 1 << 33,
            "max_step_tokens": 2048,
            "store": True,
            "started": "2026-01-01T10:00:00+00:00",
            "finished": "2026-01-01T10:10:00+00:00",
        },
    }


def write_set(folder: Path, count: int = 200) -> None:
    """Three tasks by four methods, with facts to plot, and ablations of graph-kv."""
    tasks = {
        "nq-positions": (lambda i: {"gold_position": i % 10}, lambda i: 0.55 + 0.012 * abs(i % 10 - 5), ()),
        "morehopqa": (lambda i: {"hops": 2 + i % 4}, lambda i: 0.6 - 0.08 * (i % 4), ("date", "number", "yes or no")),
        "arxiv-qa": (lambda i: {"distractors": i % 3}, lambda i: 0.7 - 0.1 * (i % 3), ("first", "last")),
    }
    for task, (facts, chance, kinds) in tasks.items():
        for method, (skill, computed, ttft) in METHODS.items():
            write_run(
                folder / task / method, task=task, method=method, count=count, facts=facts, kinds=kinds,
                chance=lambda i, c=chance, s=skill: c(i) + s, cost=(computed, ttft),
            )  # fmt: skip
    ablations = {"base": 0.06, "mask-only": 0.02, "positions-only": -0.10, "neither": -0.04, "random-edges": 0.05}
    for name, skill in ablations.items():
        write_run(
            folder / "ablations" / name, task="morehopqa", method="graph-kv", count=count, facts=tasks["morehopqa"][0],
            chance=lambda i, s=skill: tasks["morehopqa"][1](i) + s, ablation=None if name == "base" else name,
            kinds=tasks["morehopqa"][2], cost=(120, 0.11),
        )  # fmt: skip
