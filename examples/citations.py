"""Ask over documents that cite each other: graph-kv lets each one read those it cites, and everything is stored once.

python examples/citations.py MODEL [STORE]

Without a model, the tiny random one of `kvgraph demo` shows what is computed and what is reused.
"""

import sys
import tempfile
from pathlib import Path

from kvgraph import ContextGraph, Engine, demo


def main(model: str, store: str) -> None:
    documents = demo.documents()
    graph = ContextGraph(
        {document.name: document.text for document in documents},
        prefix="Answer from these documents.\n\n",
        edges=demo.citations(),  # (cited, citing): the second reads the first
    )
    with Engine.load(model, store=store) as engine:
        for question in demo.questions():
            result = engine.generate(graph.with_query(f"\nQuestion: {question}\nAnswer:"), "graph-kv", max_tokens=32)
            usage = result.usage
            print(f"{question}\n  {result.text!r}")
            print(f"  {usage.document_tokens_computed} document tokens computed, reused {usage.reused_tokens}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else folder
        if model == folder:
            demo.write_model(Path(folder))
        main(model, sys.argv[2] if len(sys.argv) > 2 else f"{folder}/kv")
