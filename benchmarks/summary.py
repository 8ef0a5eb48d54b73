"""Write benchmarks/RESULTS.md from the JSON files in benchmarks/results/, each made by the command it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import world
from benchmarks.common import text

HERE = Path(__file__).parent
ORDER = ["ttft", "concurrency", "encoding", "context", "precision", "serving", "evaluation", "training", "world"]


def section(found: dict[str, Any]) -> list[str]:
    """One benchmark as Markdown: title, command, environment, table, goals."""
    environment = found["environment"]
    lines = [f"## {found['title']}", "", f"`{environment['command'].strip()}`", ""]
    lines.append(
        f"{environment['hardware']}, {environment['threads']} thread(s); Python {environment['python']}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}."
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


def main() -> None:
    files = sorted(
        (HERE / "results").glob("*.json"), key=lambda f: (ORDER.index(f.stem) if f.stem in ORDER else 99, f.stem)
    )
    lines = [
        "# Results",
        "",
        "`make bench` makes this page. Every section names its command. Figures are medians, and all sides of a table are measured",
        "in one run. Clocks start after the model is loaded, from token ids. The model is a random Llama of 124 M parameters in",
        "float32, with these exceptions: the table of precisions has a tiny random model for each family; serving and evaluation",
        "use a tiny random model; training and the synthetic world name their models.",
        "",
    ]
    for file in files:
        lines += section(json.loads(file.read_text()))
        if file.stem == "context":
            lines += ["![Time to first token as the context grows](../docs/images/ttft-context.png)", ""]
    (HERE / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
