"""The synthetic world's recipe: the small model that ships with kvgraph. `runs/world.sh` runs both halves."""

from __future__ import annotations

from typing import Any

from kvgraph.data.tokenizer import kvlink
from kvgraph.train.config import MUON, TRAPEZOID, Component, Config, Stage

START = "world"  # the untrained model of kvgraph.train.start


def world_base() -> Config:
    """A model that reads facts off documents, alone and two in a row, in one ordinary prompt."""
    one = "world:hops,questions=32,entities=2-3,types=1-hop"
    two = "world:hops,questions=24,entities=2-4,types=1-hop+1-hop+2-hop+2-hop+2-hop"
    stages = (
        Stage((Component("1-hop", one, ("full",)),), steps=350),
        Stage((Component("2-hop", two, ("full",)),), steps=500),
    )
    return _config("world-base", stages)


def world_mixed() -> Config:
    """Goes on from world-base by every method at once, and with documents cut into chunks that need each other."""
    hops = "world:hops,questions=24,types=1-hop+2-hop+3-hop+comparison"
    stages = (Stage((Component("hops", hops, ("full", "block", kvlink(4), "graph-kv")),), steps=1000),)
    return _config("world-mixed", stages)


def _config(name: str, stages: tuple[Stage, ...], **more: Any) -> Config:
    settings: dict[str, Any] = {
        "model": START,
        "batch": 8,
        "length": 8192,
        "document_weight": 0.1,
        "optimizer": MUON,
        "lr": 5e-4,
        "matrix_lr": 0.01,
        "schedule": TRAPEZOID,
        "weight_decay": 0.02,
        "betas": (0.9, 0.98),
        "threads": 1,
        "evaluate_every": 250,
        "save_every": 250,
    }
    return Config(name=name, stages=stages, **(settings | more))
