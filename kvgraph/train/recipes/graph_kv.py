"""Tuning for Graph-KV (arXiv 2506.07334). The paper tunes only for block attention and uses the graph afterwards."""

from __future__ import annotations

from kvgraph.train.config import SELECTIVE, Component, Config, Stage

ROUNDS = ("graph-kv:rounds=1", "graph-kv:rounds=2", "graph-kv:rounds=1,layout=tight", "block", "full")
EDGES = ("all", "top-k:1", "top-k:3", "layers:1-3", "chain", "none")


def graph_kv() -> Config:
    """Questions over retrieved passages, with many kinds of edges and one or two rounds, and ordinary conversations.

    Full and block mode are in the mixture, so that one model answers by every method. No paper did this. The learning
    rate, batch and length are Block-Attention's; the rest hasn't been tuned.
    """
    return Config(
        name="graph-kv",
        model="meta-llama/Llama-3.2-1B-Instruct",
        data="data",
        stages=(
            Stage(
                (
                    Component("qa-2wiki", "qa-2wiki", ROUNDS, 35, edges=EDGES),
                    Component("qa-trivia", "qa-trivia", ROUNDS, 15, edges=EDGES),
                    Component("sft-mem", "daring-anteater-mem", ROUNDS, 20, edges=("chain",)),
                    Component("tulu", "tulu", ("full",), 30),
                ),
                steps=2000,
            ),
        ),
        batch=64,
        length=8192,
        lr=2e-5,
        warmup=0.05,
        betas=(0.9, 0.999),
        checkpointing=SELECTIVE,
    )
