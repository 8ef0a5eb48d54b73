"""Block-Attention's tuning (arXiv 2409.15355, section 3.4 and its training details)."""

from __future__ import annotations

from kvgraph.train.config import SELECTIVE, Component, Config, Stage


def block_attention() -> Config:
    """One epoch of Tulu cut into blocks and of questions over retrieved passages. Every sample is trained in full and in
    block mode, so that the model can do both.
    """
    both = ("full", "block")
    return Config(
        name="block-attention",
        model="meta-llama/Llama-3.1-8B",
        data="data",
        stages=(
            Stage(
                (
                    Component("tulu", "tulu-blocks", both, 80, every=True),
                    Component("qa-2wiki", "qa-2wiki", both, 10, every=True),
                    Component("qa-trivia", "qa-trivia", both, 10, every=True),
                ),
                epochs=1.0,
            ),
        ),
        batch=64,
        length=8192,
        lr=2e-5,
        warmup=0.02,
        betas=(0.9, 0.999),
        checkpointing=SELECTIVE,
    )
