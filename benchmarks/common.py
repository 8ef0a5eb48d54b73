"""Shared by all benchmarks: the model under test, medians of interleaved sides, a table and a JSON file."""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from kvgraph import ContextGraph, Engine, models

# A random Llama of 124 M parameters.
SMALL = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
    intermediate_size=2048, vocab_size=32000, max_position_embeddings=65536, tie_word_embeddings=False,
)  # fmt: skip
# An 8B-shaped one (the published shape of Llama-3.1-8B) for GPUs.
LARGE = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The common command line; keyword defaults become flags of their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the 8B shape in bf16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every side")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def hf_model(device: str = "cpu") -> Any:
    """A random Llama with Hugging Face's own SDPA attention: the 124 M one in fp32, on CUDA the 8B shape in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL if device == "cpu" else LARGE))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)


def engine_on(hf: Any, **options: Any) -> Engine:
    """An engine on the same weights, not a copy; see `model_on`."""
    return Engine(model_on(hf), **options)


def model_on(hf: Any) -> models.Model:
    """The same weights, not a copy, in a module of its own: the other side's module stays unchanged."""
    config = copy.deepcopy(hf.config)
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    twin.load_state_dict(hf.state_dict(), assign=True)
    twin.model.rotary_emb = type(hf.model.rotary_emb)(config).to(hf.device)
    return models.wrap(twin.eval())


def ids(n: int, seed: int, vocab: int = 32000) -> list[int]:
    return torch.randint(5, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def documents(count: int = 10, length: int = 400, query: int = 30, first: int = 0) -> ContextGraph:
    """`count` documents of `length` random tokens and a query."""
    return ContextGraph([ids(length, first + i) for i in range(count)], query=ids(query, 10_000 + first))


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every side: `repeats` runs in turn, after one warm-up each, so that a drifting machine affects all sides alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, run in sides.items():
            sync(device)
            started = time.perf_counter()
            run()
            sync(device)
            if round_:
                times[name].append(time.perf_counter() - started)
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def report(
    title: str, rows: list[dict[str, Any]], args: argparse.Namespace, goals: dict[str, tuple[float, str]] | None = None
) -> None:
    """Print rows as an aligned table, and figures with their goals; write both, with the environment, as JSON."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(k for row in rows for k in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(text(row.get(c, "")) for c in columns))
    Console(width=140).print(table)
    for name, (value, goal) in (goals or {}).items():
        print(f"{name}: {text(value)} (goal: {goal})")
    if args.json:
        hardware = torch.cuda.get_device_name() if args.device != "cpu" else cpu_name()
        environment = {
            "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} " + " ".join(sys.argv[1:]),
            "hardware": hardware, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "load": round(os.getloadavg()[1], 1), "cores": os.cpu_count(),
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"title": title, "environment": environment, "rows": rows, "goals": goals or {}}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's name, if the system provides it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def text(value: Any) -> str:
    """A number as text for a table."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
