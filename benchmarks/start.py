"""From the shell prompt to the first token of `kvgraph ask` over stored documents, and what takes how long.

The model is that of `kvgraph demo`, which answers over five of its articles. Every run is a new process. Warm: the documents
are in the store, the converted weights in the cache folder, and the gate has been passed before. First ever: the cache
folder is empty, so the GGUF file is converted, its adapter merged, and the gate run; the documents are in the store.

Run it in an environment with what users of the command line have, `pip install 'kvgraph[demo]'`: transformers imports scipy and
boto3 where it finds them, which takes half a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

QUESTION = r"\nWho discovered polonium?\n"
METHOD, PICK = "block", "0,1,2,3,4"
PARTS = ("import", "load", "gate", "read and first token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    known, _ = parser.parse_known_args()
    if known.child:
        return parts(Path(known.child))
    from benchmarks.common import arguments, median, report
    from kvgraph import demo

    args = arguments(__doc__, repeats=5, model=str(demo.adapter()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "kvgraph.cli", "ask", args.model, QUESTION, "--documents", str(demo.DOCUMENTS)]
        command += ["--pick", PICK, "--method", METHOD, "--store", str(folder / "kv"), "--max-tokens", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "XDG_CACHE_HOME": str(folder / "first")}
        first_token(command, environment)  # stores the documents
        first, warm, asked = [], [], []
        for i in range(args.repeats):
            first.append(child(args.model, folder / "kv", environment | {"XDG_CACHE_HOME": str(folder / str(i))}))
            warm.append(child(args.model, folder / "kv", environment))
            asked.append(first_token(command, environment))
    rows = []
    for side, found in (("warm", warm), ("first ever", first)):
        for part in (*PARTS, "all"):
            seconds, busy = ([run[part][i] for run in found] for i in range(2))
            rows.append(
                {"side": side, "part": part, "median s": median(seconds), "best s": min(seconds), "CPU s": median(busy)}
            )
    rows.append({"side": "warm", "part": "kvgraph ask", "median s": median(asked), "best s": min(asked)})
    by = {(row["side"], row["part"]): row["median s"] for row in rows}
    report(
        "From the shell prompt to the first token of `kvgraph ask`, SmolLM2-135M",
        rows,
        args,
        {
            "kvgraph ask, warm, s": (by["warm", "kvgraph ask"], "<= 3"),
            "of which import, s": (by["warm", "import"], "<= 1.5"),
            "gate at the first load, s": (by["first ever", "gate"], "<= 5"),
        },
    )


def first_token(command: list[str], environment: dict[str, str]) -> float:
    """Seconds until the command prints the first byte of its answer."""
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.read(1), "no answer"
        taken = time.perf_counter() - started
        process.stdout.read()
    assert process.returncode == 0
    return taken


def child(model: str, store: Path, environment: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Seconds of every part in a new process, from its start: passed, and of processor time."""
    command = [sys.executable, "-m", "benchmarks.start", "--child", str(store)]
    environment = environment | {"KVGRAPH_START": f"{time.time()} {model}"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, tuple[float, float]] = json.loads(answer.splitlines()[-1])
    return found


def parts(store: Path) -> None:
    """What `kvgraph ask` does, with a clock between its parts."""
    started, _, model = os.environ["KVGRAPH_START"].partition(" ")
    clock = [(float(started), 0.0)]

    def tick() -> None:
        clock.append((time.time(), time.process_time()))

    from kvgraph import garbage

    garbage.starting()
    from kvgraph import demo
    from kvgraph.checks import gate
    from kvgraph.cli import common
    from kvgraph.engine.engine import Engine, composed, load_model

    tick()
    loaded = load_model(model, check=False)
    tick()
    gate.require(loaded, composed(loaded))
    tick()
    documents = common.chosen(demo.DOCUMENTS, None, [PICK])
    with Engine(loaded, store=store) as engine:
        usage = engine.generate(common.graph_of(documents, common.unescaped(QUESTION)), METHOD, max_tokens=1).usage
        tick()
    assert usage.document_tokens_computed == 0 and set(usage.reused_tokens) == {"disk"}, usage
    taken = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clock)]
    taken.append((clock[-1][0] - clock[0][0], clock[-1][1]))
    print(json.dumps(dict(zip((*PARTS, "all"), taken, strict=True))))


if __name__ == "__main__":
    main()
