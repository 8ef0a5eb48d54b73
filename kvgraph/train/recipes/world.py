"""The synthetic world's recipes, for a small model that answers by every method. `runs/world.sh` runs them in a row.

The model's abilities are built up in stages. Three layers read one fact. Copies of them on top continue from the fact that
was found (progressive stacking): once for two facts in a row, once more for three. These stages use ordinary prompts and
give "world-base". "world-mixed" then trains every method at once. It begins with the link tokens of KVLink, which learn
from chunks that need each other: one statement per chunk, and partly with the documents hidden from the questions.
"""

from __future__ import annotations

from typing import Any

from kvgraph.data.world.tokenizer import LINKS_EACH, kvlink
from kvgraph.train.config import MUON, TRAPEZOID, Component, Config, Stage

START = "world"  # the untrained model of kvgraph.train.start
LAYERS = 3  # of the first model, and added by each stacking
LINKED = kvlink(LINKS_EACH)
HOPS = "world:hops,questions=24"
FEWER = "world:hops,questions=16"
CHUNKS = "world:chunks,questions=16"
ALL = "types=1-hop+2-hop+3-hop+comparison"


def world_1hop() -> Config:
    """A new model of three layers, trained on questions that need one document, as ordinary prompts."""
    one = Component("1-hop", f"{HOPS},entities=2-3,types=1-hop", ("full",))
    return _config("world-1hop", Stage((one,), steps=400), model=START)


def world_2hop() -> Config:
    """Continues world-1hop (--model) with three more layers: questions that follow or compare two documents."""
    two = Component("2-hop", f"{HOPS},entities=2-4,types=1-hop+2-hop+2-hop+comparison", ("full",))
    return _config("world-2hop", Stage((two,), steps=350), stack=LAYERS)


def world_base() -> Config:
    """Continues world-2hop (--model) with three more layers: all questions, as ordinary prompts."""
    hops = Component("hops", f"{HOPS},entities=2-6,{ALL}", ("full",), 2.0)
    chunks = Component("chunks", f"{CHUNKS},entities=2-6,types=named+pronoun+pronoun", ("full",))
    return _config("world-base", Stage((hops, chunks), steps=450), stack=LAYERS, decay=0.2)


def world_mixed() -> Config:
    """Continues world-base (--model): every method at once, after a first stage for the links.

    The mixture also has substitutes for edges (ids or names in the text) and reversed edges. Thus the world's controls
    compare what can be learned, and not what happened to be trained.
    """
    easy = f"{CHUNKS},entities=2-3,types=pronoun"
    beginning = (
        Component("hops", f"{FEWER},entities=2-4,{ALL}", ("full", "block", LINKED, "graph-kv"), 2.0),
        Component("links-hops", f"{HOPS},entities=2-3,types=1-hop", (LINKED,), through_links=True),
        Component("links-chunks", f"{easy},statements=1", (LINKED,), 2.0, through_links=True),
        Component("easy-chunks", f"{easy},statements=1", (LINKED,)),
        Component("chunks", easy, ("full", "graph-kv")),
        Component("chunks-shuffled", f"{easy},order=shuffled", ("graph-kv",)),
    )
    chunks = f"{CHUNKS},entities=3-6,types=named+pronoun+pronoun"
    shuffled = f"{chunks},order=shuffled"
    every = (
        Component("hops", f"{FEWER},entities=2-6,{ALL}", ("full", "block", LINKED, "graph-kv"), 4.0),
        Component("easy-chunks", f"{CHUNKS},entities=2-4,types=pronoun,statements=1", (LINKED,)),
        Component("links", chunks, (LINKED,), 2.0),
        Component("chunks", chunks, ("full", "graph-kv"), 2.0),
        Component("chunks-shuffled", shuffled, ("graph-kv",)),
        Component("reversed", f"{shuffled},edges=reversed", ("graph-kv",)),
        Component("names", f"{shuffled},prefix=name", ("full", "block")),
        Component("ids", f"{chunks},prefix=id", ("full",)),
        Component("ids-shuffled", f"{shuffled},prefix=id", ("full",)),
    )
    return _config("world-mixed", Stage(beginning, steps=300), Stage(every, steps=650), decay=0.3)


def _config(name: str, *stages: Stage, **more: Any) -> Config:
    settings: dict[str, Any] = {
        "model": "",  # of the previous recipe
        "batch": 8,
        "length": 8192,
        "document_weight": 0.1,
        "optimizer": MUON,
        "lr": 5e-4,
        "matrix_lr": 0.01,
        "schedule": TRAPEZOID,
        "warmup": 40 / sum(stage.steps for stage in stages),
        "decay": 0.1,
        "weight_decay": 0.02,
        "betas": (0.9, 0.98),
        "threads": 1,
        "evaluate_every": 250,
        "evaluation": 32,
        "save_every": 250,
    }
    return Config(name=name, stages=stages, **(settings | more))
