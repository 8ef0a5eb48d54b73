"""A folder of documents to cited answers: `kvgraph index`, `kvgraph serve`, and ten questions by the openai client.

For each question: whether its page is among the citations, document tokens computed, and the time to the first token,
with `retrieve` and with the same chunks as one flat prompt to the same server. The corpus is this project's documentation, or a part
of it (--part); --model is the one of `kvgraph demo` unless given.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import OpenAI

from benchmarks.common import arguments, median, report
from benchmarks.serving import READY
from kvgraph import demo

DOCS = Path(__file__).parents[1] / "docs"
FOUND = 5  # chunks a question
ANSWER_TOKENS = 8
QUESTIONS = (  # with the pages that answer each
    ("What are the bytes of a record file, from its header to its checksum?", ("reference/format.md",)),
    ("How do I add a composition method of my own in one file?", ("extending.md",)),
    ("Why is the query rotated and not the cached keys?", ("explanation/positions.md", "design.md")),
    ("What do KVLink's link tokens see, and where do they stand?", ("explanation/methods.md", "design.md")),
    ("Which answers does kvgraph data prepare ask an endpoint for?", ("reference/data.md",)),
    ("How do I give a tenant an API key and limit its requests a minute?", ("reference/configuration.md", "how-to/operate.md", "how-to/serve.md")),
    ("Which columns does the report of an evaluation have?", ("reference/reports.md", "reference/evaluation.md")),
    ("What is a hop in a question about the synthetic world?", ("reference/world.md", "notes/world.md")),
    ("How can I look at the plan of a request in the playground?", ("how-to/inspect.md",)),
    ("How does training resume after it was killed?", ("reference/training.md", "how-to/train.md")),
)  # fmt: skip


class Asked(NamedTuple):
    """One answer. ttft: seconds until its first text. computed: document tokens. cited: ids of chunks."""

    ttft: float
    computed: int
    cited: tuple[str, ...]


def ask(client: OpenAI, model: str, question: str, **kvgraph: Any) -> Asked:
    """Stream an answer."""
    started, first, computed, cited = time.perf_counter(), 0.0, 0, ()
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"kvgraph": kvgraph, "ignore_eos": True},
    ):
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - started
        found: Any = chunk.model_extra or {}
        cited = tuple(c["id"] for c in found.get("citations") or ()) or cited
        if chunk.usage is not None:
            computed = (chunk.usage.model_extra or {})["kvgraph"]["document_tokens_computed"]
    return Asked(first, computed, cited)


def main() -> None:
    args = arguments(__doc__, model="", part="", store="", embedder="")
    with tempfile.TemporaryDirectory() as made:
        folder, store = Path(made), Path(args.store or f"{made}/kv")
        (folder / "pages").mkdir()
        for page in sorted(DOCS.rglob("*.md")):
            inside = page.relative_to(DOCS)
            if not args.part or any(str(inside).startswith(part) for part in args.part.split(",")):
                (folder / "pages" / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / "pages" / inside).write_bytes(page.read_bytes())
        model = args.model or str(demo.adapter())
        kvgraph = [sys.executable, "-m", "kvgraph.cli"]
        index = [*kvgraph, "index", str(folder / "pages"), "--name", "docs", "--store", str(store), "--model", model]
        started = time.perf_counter()
        indexed = subprocess.run([*index, *(["--embedder", args.embedder] if args.embedder else [])], check=True, text=True, stdout=subprocess.PIPE)  # fmt: skip
        print(indexed.stdout, f"indexed in {time.perf_counter() - started:.0f} s", flush=True)
        serve = [*kvgraph, "serve", "--model", model, "--served-name", "model", "--store", str(store), "--port", "8797"]
        server = subprocess.Popen(serve, stderr=subprocess.DEVNULL, env={**os.environ})
        try:
            rows = measured("http://127.0.0.1:8797")
        finally:
            server.terminate()
            server.wait()
    right = sum(row["right page"] == "yes" for row in rows)
    most = max(row["document tokens computed"] for row in rows)
    ratio = median([row["flat TTFT ms"] / row["TTFT ms"] for row in rows])
    goals = {
        "questions with the right page among the citations": (right, f">= 8 of {len(rows)}"),
        "document tokens computed, at most": (most, "0"),
        "flat TTFT / TTFT, median": (ratio, "> 1"),
    }
    report("From a folder of documents to cited answers", rows, args, goals)


def measured(url: str) -> list[dict[str, Any]]:
    """The questions, each with `retrieve` and as a flat prompt."""
    deadline = time.monotonic() + READY
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise SystemExit("the server isn't ready")
        time.sleep(0.1)
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    ask(client, "model", "What is kvgraph?", graph="docs", retrieve=FOUND)  # what stands before documents in every chat
    rows = []
    for question, pages in QUESTIONS:
        asked = ask(client, "model", question, graph="docs", retrieve=FOUND)
        texts = [httpx.get(f"{url}/v1/segments/{id}").json() for id in asked.cited]
        flat = "".join(f"{one['title']}\n{one['text']}\n\n" for one in texts) + question
        plain = ask(client, "model", flat, method="full")
        names = [id.rpartition(".")[0] for id in asked.cited]
        right = any(_slug(page) in names for page in pages)
        rows.append(
            {
                "question": question,
                "right page": "yes" if right else "no",
                "document tokens computed": asked.computed,
                "TTFT ms": 1000 * asked.ttft,
                "flat TTFT ms": 1000 * plain.ttft,
            }
        )
        print(question, names, flush=True)
    return rows


def _slug(page: str) -> str:
    from kvgraph.data.cut import slug

    return slug(page)


if __name__ == "__main__":
    main()
