"""Encoding a corpus by one process and by two workers on a local Ray, into stores that must be equal byte for byte.

Each worker has a thread, as the one process has. Tokens a second are those of the work: of the one process from its first batch to
its last byte, and of the workers the sum of what each made while it was at work. The seconds of whole commands, which load
the model first, stand beside them; starting Ray is not in them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, report
from kvgraph import demo
from kvgraph.cluster.encoding import LOCAL, connected, encode_on
from kvgraph.data import corpus
from kvgraph.encoding import Documents, Done, Encoder, batches
from kvgraph.methods import parse

METHOD = "block"


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def main() -> None:
    args = arguments(__doc__, documents=512, words=100, workers=2)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the workers
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        demo.write_model(model)
        texts = (f"{i} " + "of many words " * (args.words // 3) for i in range(args.documents))
        (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = corpus.load(folder / "c.jsonl", "{text}")
        items, loading = Documents(parse(METHOD), ""), {"model": str(model), "check": False}

        started, one = time.perf_counter(), Done()
        with Encoder(items, [str(folder / "one")], **loading) as encoder:
            begun = time.perf_counter()
            for batch in batches(found):
                one.add(encoder.encode(batch))
            encoder.flush()
            rate = one.computed / (time.perf_counter() - begun)
        rows.append({"side": "one process", "tokens/s": rate, "seconds": time.perf_counter() - started})

        with connected(LOCAL):
            started, many = time.perf_counter(), Done()
            encode_on("auto", items, found, [str(folder / "many")], loading, many, args.workers)
            seconds = time.perf_counter() - started
        rows.append(
            {
                "side": f"{args.workers} workers",
                "tokens/s": args.workers * many.computed / many.seconds,
                "seconds": seconds,
            }
        )
        equal = records(folder / "one") == records(folder / "many")
    alone, together = (row["tokens/s"] for row in rows)
    report(
        f"Encoding {args.documents} documents of the tiny model by workers on a Ray",
        rows,
        args,
        {
            f"tokens/s of {args.workers} workers / one process": (together / alone, "> 1"),
            "stores equal byte for byte": (float(equal), "= 1"),
        },
    )


if __name__ == "__main__":
    main()
