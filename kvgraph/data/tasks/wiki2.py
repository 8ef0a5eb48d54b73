"""2WikiMultiHopQA: two or four gold paragraphs among ten, in HotpotQA's format."""

from __future__ import annotations

from dataclasses import replace

from kvgraph.data.task import Hub
from kvgraph.data.tasks.hotpotqa import HOTPOTQA

WIKI2 = replace(
    HOTPOTQA,
    name="2wiki",
    about="2WikiMultiHopQA: comparison, compositional, inference and bridge-comparison questions over ten paragraphs",
    source="2WikiMultiHopQA (arXiv 2011.01060): github.com/Alab-NII/2wikimultihop, dev.json",
    hub=Hub("xanhho/2WikiMultihopQA", file="dev.parquet"),
    breakdowns=("kind", "hops"),
)
