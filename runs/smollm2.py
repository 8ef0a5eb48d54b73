"""Train the adapter of SmolLM2-135M-Instruct within a time limit, on a GPU or a CPU, and measure what it gives.

    python runs/smollm2.py --model MODEL --data DATA --out OUT --minutes 5

DATA is what runs/smollm2_data.py makes. Three runs: `answers` learns from gold answers by all methods at once; `distill` goes on
from it without labels, and is what ships; `unlabelled` is the distillation of the model as it comes. A fourth if it is asked for:
`sentences` goes on from `unlabelled`, with the data that runs/smollm2_sentences.py adds. OUT gets their adapters, logs and tables.
What fails is said, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import gzip
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvgraph.train import gap, model, recipes, trainer
from kvgraph.train.config import ATTENTIONS, SDPA, Config
from kvgraph.train.forward import logits
from kvgraph.train.mixture import VALIDATION
from kvgraph.train.pack import Packed
from kvgraph.train.recipes.smollm2 import KVLINK
from kvgraph.train.records import Records

STARTED = time.monotonic()
RUNS = {"answers": 0.6, "distill": 0.15, "unlabelled": 0.25, "sentences": 0.25}  # shares of the time to train
USUAL = ("answers", "distill", "unlabelled")
OVERHEAD = 14.0  # seconds that a run takes besides its steps
COMMON: tuple[gap.Way, ...] = (("block", "none"), (KVLINK, "none"), ("pcw", "none"))
OWN: tuple[gap.Way, ...] = (*COMMON, ("graph-kv", "links"), ("graph-kv", "random"), ("graph-kv", "none"))
WAYS: dict[str, tuple[gap.Way, ...]] = {
    "passages": (*COMMON, ("graph-kv", "all"), ("graph-kv", "top-k:3"), ("prompt-cache", "none"), ("epic", "none")),
    "stories": OWN,
    "hops": (*OWN, ("graph-kv", "all")),
}


def main() -> None:
    """Run everything."""
    options = _options()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    base = _changed(recipes.get("smollm2-answers"), options)
    if torch.cuda.is_available():
        _say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    adapters: dict[str, Path] = {}
    for number, name in enumerate(options.runs):
        rest = options.runs[number:]
        seconds = (_left(options) - OVERHEAD * len(rest) - options.tables) * RUNS[name] / sum(RUNS[n] for n in rest)
        config = dataclasses.replace(
            _changed(recipes.get(f"smollm2-{name}"), options),
            minutes=0.0 if options.steps else max(seconds, 1.0) / 60,
            adapter=str(_start(name, adapters, options)),
        )
        _say(f"{name}: {seconds:.0f} s")
        done = _attempted(name, lambda config=config, name=name: trainer.train(config, out / f"{name}.run"))
        _freed()
        if done is None:
            continue
        adapters[name] = out / name
        shutil.copytree(done.checkpoint / "adapter", adapters[name], dirs_exist_ok=True)
        shutil.copy(out / f"{name}.run" / "log.jsonl", adapters[name])
        (adapters[name] / "config.json").write_text(config.to_json())
        _say(f"{name}: {done.step} steps; {_course(adapters[name] / 'log.jsonl')}")
    for name in ("distill", "unlabelled", "sentences"):
        if name in adapters and options.tables:
            _attempted(f"table of {name}", lambda name=name: _table(base, adapters, name, options))
            _freed()
    _say("done")


def _start(name: str, adapters: dict[str, Path], options: argparse.Namespace) -> Path | str:
    """The adapter that a run goes on from."""
    started = options.start or ""
    goes_on = {"answers": "", "distill": "answers", "sentences": "unlabelled"}
    return adapters.get(goes_on[name], started) if name in goes_on else ""


def _left(options: argparse.Namespace) -> float:
    """Seconds until the end."""
    return float(options.minutes * 60 - (time.monotonic() - STARTED))


def _course(log: Path) -> str:
    """How the loss went, and how fast."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    parts = [rows[i : i + max(1, len(rows) // 6)] for i in range(0, len(rows), max(1, len(rows) // 6))]
    means = " ".join(f"{sum(row['loss'] for row in part) / len(part):.3f}" for part in parts)
    later = rows[len(rows) // 4 :]
    speed = sum(row["tokens"] for row in later) / sum(row["seconds"] for row in later)
    return f"loss {means}; {speed:,.0f} tokens/s"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument(
        "--tables", type=float, default=40.0, help="seconds of these to keep for the tables; 0 for none"
    )
    parser.add_argument(
        "--runs", nargs="+", choices=tuple(RUNS), default=USUAL, help=f"in this order [default: {' '.join(USUAL)}]"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 for torch's choice")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--attention", choices=ATTENTIONS, default=SDPA)
    parser.add_argument("--limit", type=int, default=0, help="steps of each run, to try it out")
    parser.add_argument("--steps", type=int, default=0, help="of each run, instead of a time limit")
    parser.add_argument("--lr", type=float, help="peak learning rate [default: the recipe's]")
    parser.add_argument("--start", type=Path, help="an adapter to go on from, for all but unlabelled")
    parser.add_argument("--examples", type=int, default=36, help="of each held-out set in a table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return options


def _changed(config: Config, options: argparse.Namespace) -> Config:
    stages = tuple(dataclasses.replace(stage, steps=options.steps or stage.steps) for stage in config.stages)
    return dataclasses.replace(
        config,
        stages=stages,
        lr=options.lr or config.lr,
        model=options.model,
        data=str(options.data),
        workers=options.workers,
        threads=options.threads,
        length=options.length,
        batch=options.batch,
        attention=options.attention,
        limit=options.limit,
        save_every=20,
        evaluate_every=10**6,
    )


def _say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def _attempted(what: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception:
        _say(f"{what} failed:\n{traceback.format_exc()}")
        return None


def _freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _table(config: Config, adapters: dict[str, Path], name: str, options: argparse.Namespace) -> None:
    """Score held-out records before and after, as long as there is time, and write rows and tables."""
    from peft import PeftModel

    device = torch.device(options.device)
    student = model.build(dataclasses.replace(config, adapter=str(adapters[name])))
    module: Any = student.module
    assert isinstance(module, PeftModel)
    shown: dict[str, Any] = {}
    if name == "distill" and "answers" in adapters:
        module.load_adapter(str(adapters["answers"]), "answers")
        shown["answers"] = lambda: _set(module, "answers")
    shown["base"] = module.disable_adapter
    shown[name] = lambda: _set(module, model.STUDENT)
    module.to(device).eval()

    def run(packed: Packed) -> torch.Tensor:
        placed = packed.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return logits(student.trainable, placed, module=module, flex=False)

    rows: list[gap.Scored] = []
    told = []
    for data in (*WAYS, "test-nq"):
        if _left(options) < 5:
            _say(f"no time for {data}")
            continue
        records = Records(options.data / data, VALIDATION, student.tokenizer, recite=3)
        numbers = range(min(options.examples, len(records)))
        ways = WAYS.get(data, WAYS["passages"])
        scored = list(gap.score(run, shown, records, numbers, ways, config.length))
        rows += scored
        for before in [state for state in shown if state != name]:
            lines = gap.table(scored, before, name)
            told.append(f"{data}: {name}, compared with {before}\n{gap.text(lines)}\n")
            _say(told[-1])
        with gzip.open(options.out / name / "scored.jsonl.gz", "at") as file:
            file.writelines(json.dumps({"data": data} | row._asdict()) + "\n" for row in scored)
    (options.out / name / "table.txt").write_text("\n".join(told))


@contextlib.contextmanager
def _set(module: Any, adapter: str) -> Iterator[None]:
    module.set_adapter(adapter)
    yield


if __name__ == "__main__":
    main()
