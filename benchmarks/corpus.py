"""A folder of documents to cited answers: `kvgraph index`, `kvgraph serve`, and ten questions by the openai client.

For each question: whether its page is among the citations, document tokens computed, and the time to the first token,
with `retrieve` and with the same chunks as one flat prompt to the same server. Then one page is changed, and indexed again.

    python -m benchmarks.corpus
    python -m benchmarks.corpus --corpus python --model tiny

The corpus is this project's documentation, or Debian's package python3-doc (6.3 million tokens), or a part of one (--part). The
model is the one of `kvgraph demo`, another, or "tiny": random, with two layers and the demo model's tokenizer. It answers nothing,
but the retrieval is the same, and a corpus that takes the demo's model half a day takes it minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import OpenAI

from benchmarks.common import arguments, median, report
from benchmarks.serving import READY
from kvgraph import demo

DOCS = {  # folder, and the ending of its pages
    "kvgraph": (Path(__file__).parents[1] / "docs", ".md"),
    "python": (Path("/usr/share/doc/python3-doc/html"), ".html"),
}
FOUND = 5  # chunks a question
ANSWER_TOKENS = 8
KVGRAPH = (  # questions, with the pages that answer each
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
PYTHON = (
    ("How do I parse a string of JSON into Python objects?", ("library/json.html",)),
    ("How do I run another program and capture what it prints?", ("library/subprocess.html",)),
    ("Which method of a path finds files by a pattern in all subfolders?", ("library/pathlib.html", "library/glob.html")),
    ("How do I give the field of a dataclass a default value that is a new list each time?", ("library/dataclasses.html",)),
    ("What is an assignment expression with := for?", ("whatsnew/3.8.html", "reference/expressions.html", "faq/design.html")),
    ("How do I create a virtual environment?", ("library/venv.html", "tutorial/venv.html", "installing/index.html")),
    ("How do I write a lookahead assertion in a regular expression?", ("library/re.html", "howto/regex.html")),
    ("How do I run several coroutines concurrently and wait for all of them?", ("library/asyncio-task.html",)),
    ("How do I pass parameters to an SQL query of an SQLite database safely?", ("library/sqlite3.html",)),
    ("How do I read a CSV file into dictionaries, row by row?", ("library/csv.html",)),
)  # fmt: skip
QUESTIONS = {"kvgraph": KVGRAPH, "python": PYTHON}
ADDED = "One more sentence, which no page had before."


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
    args = arguments(__doc__, corpus="kvgraph", model="", part="", store="", embedder="", graph="", chunk_tokens=256)
    with tempfile.TemporaryDirectory() as made:
        folder, store = Path(made), Path(args.store or f"{made}/kv")
        pages = copied(*DOCS[args.corpus], folder / "pages", args.part.split(",") if args.part else [""])
        model = str(tiny(folder / "tiny")) if args.model == "tiny" else args.model or str(demo.adapter())
        kvgraph = [sys.executable, "-m", "kvgraph.cli"]
        index = [*kvgraph, "index", str(folder / "pages"), "--name", "docs", "--store", str(store), "--model", model]
        for option in ("embedder", "graph", "chunk_tokens"):
            index += [f"--{option.replace('_', '-')}", str(getattr(args, option))] if getattr(args, option) else []
        first = indexed(index)
        serve = [*kvgraph, "serve", "--model", model, "--served-name", "model", "--store", str(store), "--port", "8797"]
        server = subprocess.Popen(serve, stderr=subprocess.DEVNULL, env={**os.environ})
        try:
            rows = measured("http://127.0.0.1:8797", QUESTIONS[args.corpus])
        finally:
            server.terminate()
            server.wait()
        changed = folder / "pages" / QUESTIONS[args.corpus][0][1][0]
        text = changed.read_text(encoding="utf-8")
        end = "</section>" if changed.suffix == ".html" else ""  # what follows the last section isn't content
        before, _, after = text.rpartition(end) if end else (text, "", "")
        changed.write_text(f"{before}\n\n{ADDED}\n{end}{after}", encoding="utf-8")
        again = indexed(index)
    right = sum(row["right page"] == "yes" for row in rows)
    most = max(row["document tokens computed"] for row in rows)
    ratio = median([row["flat TTFT ms"] / row["TTFT ms"] for row in rows])
    goals = {
        "questions with the right page among the citations": (right, f">= 8 of {len(rows)}"),
        "document tokens computed, at most": (most, "0"),
        "flat TTFT / TTFT, median": (ratio, "> 1"),
    }
    for name, (seconds, told) in {"indexed": first, "indexed again, one page changed": again}.items():
        goals[f"{name}, s: {told}"] = (seconds, "")
    report(f"From a folder of {pages} pages to cited answers", rows, args, goals)


def copied(source: Path, ending: str, folder: Path, parts: list[str]) -> int:
    """Copy the pages of a corpus whose paths begin with one of `parts`; how many they are."""
    pages = [page for page in sorted(source.resolve().rglob(f"*{ending}"))]
    chosen = [page for page in pages if str(page.relative_to(source.resolve())).startswith(tuple(parts))]
    if not chosen:
        sys.exit(f"there are no pages in {source}; for Python's documentation: apt-get install python3-doc")
    for page in [*chosen, *source.resolve().glob("searchindex.js")]:  # by which the pages are known as Sphinx's
        target = folder / page.relative_to(source.resolve())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(page.read_bytes())
    return len(chosen)


def tiny(folder: Path) -> Path:
    """A random model of two layers with the tokenizer of the demo's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvgraph import models
    from kvgraph.models import adapters

    tokenizer = models.load(adapters.base_of(demo.adapter())).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def indexed(command: list[str]) -> tuple[float, str]:
    """Run `kvgraph index`: its seconds, and what it said it did."""
    started = time.perf_counter()
    said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    seconds = time.perf_counter() - started
    print("\n".join(said), f"indexed in {seconds:.0f} s", sep="\n", flush=True)
    return seconds, "; ".join(line for line in said if " is ready" not in line)


def measured(url: str, questions: Sequence[tuple[str, tuple[str, ...]]]) -> list[dict[str, Any]]:
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
    for question, pages in questions:
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
