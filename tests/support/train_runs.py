"""Small models, configurations and logs for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
from kvgraph.data.world import tokenizer
from kvgraph.train.config import Component, Config, Stage
from soak import SOAK

HOPS = Component("hops", "world:hops,questions=3,entities=2-2", ("full", "block", "graph-kv"), 2.0)
CHUNKS = Component("chunks", "world:chunks,questions=2,entities=2-2", ("block", tokenizer.kvlink(4)))
LINKED = Stage((Component("hops", HOPS.source, ("kvlink", "block")),), steps=6)


def write_model(folder: Path, family: str = "Llama", **changes: Any) -> str:
    """A tiny model with the world's tokenizer."""
    sizes = {"vocab_size": len(tokenizer.vocabulary()), "initializer_range": 0.05, "num_hidden_layers": 2}
    families.build(family, **sizes | changes).save_pretrained(folder)
    tokenizer.write(folder)
    return str(folder)


def config(model: str, **changes: Any) -> Config:
    """A run of eight steps in two stages, of several sequences each."""
    settings: dict[str, Any] = {
        "stages": (Stage((HOPS,), steps=3), Stage((HOPS, CHUNKS), steps=5)),
        "batch": 4,
        "length": 256,
        "document_weight": 0.1,
        "lr": 1e-3,
        "precision": "float32",
        "threads": 1,
        "workers": int(SOAK),
        "evaluate_every": 4,
        "evaluation": 2,
        "save_every": 3,
    }
    return Config(name="test", model=model, **settings | changes)


def rows(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    """Its optimizer steps, without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run) if "lr" in row]


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "exact" in row]
