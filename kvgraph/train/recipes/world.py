"""The synthetic world's recipe, for a small model that answers by every method. First settings: it learns questions that
take one document within some 350 steps; those that take two haven't been learned so far.
"""

from __future__ import annotations

from typing import Any

from kvgraph.data.tokenizer import kvlink
from kvgraph.train.config import MUON, TRAPEZOID, Component, Config, Stage

START = "world"  # the untrained model of kvgraph.train.start


def world_base() -> Config:
    """A small new model, on questions that take one document, then two in a row, in one ordinary prompt."""
    one = "world:hops,questions=32,entities=2-3,types=1-hop"
    two = "world:hops,questions=24,entities=2-4,types=1-hop+1-hop+2-hop+2-hop+2-hop"
    stages = (
        Stage((Component("1-hop", one, ("full",)),), steps=350),
        Stage((Component("2-hop", two, ("full",)),), steps=500),
    )
    return _config("world-base", stages)


def world_mixed() -> Config:
    """All hops by every method at once; with --model, on from what world-base made."""
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
