"""The adapter of SmolLM2-135M-Instruct that ships with kvgraph, and a run with distillation alone, for comparison."""

from __future__ import annotations

from dataclasses import replace

from kvgraph.train.config import DISTILL, LORA, Component, Config, Stage

# Its vocabulary has no spare rows. These ids are tokens for repositories and notebooks, which don't occur in conversations:
# one link token for each of 14 documents.
KVLINK = "kvlink:links=1,link_start=3,slots=14"
METHODS = ("full", "block", KVLINK)


def smollm2_answers() -> Config:
    """The first run: learn to answer from documents, with gold answers, by `full` and the other methods at once."""
    return Config(
        name="smollm2-answers",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data="data",
        stages=(Stage(_components(recite=1), steps=4000),),
        batch=16,
        length=16384,
        lr=1e-3,
        warmup=0.05,
        betas=(0.9, 0.99),
        trained=LORA,
        lora_rank=16,
        evaluation=0,
    )


def smollm2_distill() -> Config:
    """The second run: learn to do by every method what it does by `full`, without labels. Give it the first run's adapter."""
    return replace(
        smollm2_answers(),
        name="smollm2-distill",
        stages=(Stage(_components(recite=3), steps=4000),),
        lr=7e-4,
        objective=DISTILL,
    )


def smollm2_unlabelled() -> Config:
    """The distillation of the original model, to measure the effect of distillation alone."""
    return replace(smollm2_distill(), name="smollm2-unlabelled", lr=1e-3)


def smollm2_sentences() -> Config:
    """Learn from the model's own sentences (runs/smollm2_sentences.py). Give it the adapter of the distillation alone."""
    components = (
        Component("sentences", "sentences", METHODS, 50, recite=1),
        Component("sentences-graph", "sentences", ("graph-kv",), 26, edges=("all", "top-k:3", "none"), recite=1),
    )
    return replace(smollm2_answers(), name="smollm2-sentences", stages=(Stage(components, steps=4000),), lr=5e-4)


def _components(recite: int) -> tuple[Component, ...]:
    """Passages, stories whose sections read the ones before them, and multi-hop questions. Stories and hops are sometimes
    given random edges or none, to measure whether the true edges help.
    """
    ranked, own = ("all", "top-k:3", "none"), ("links", "links", "random", "none")
    return (
        Component("passages", "passages", METHODS, 50, recite=recite),
        Component("passages-graph", "passages", ("graph-kv",), 26, edges=ranked, recite=recite),
        Component("stories", "stories", METHODS, 8, recite=recite),
        Component("stories-graph", "stories", ("graph-kv",), 8, edges=own, recite=recite),
        Component("hops", "hops", METHODS, 4, recite=recite),
        Component("hops-graph", "hops", ("graph-kv",), 4, edges=(*own, "all"), recite=recite),
    )
