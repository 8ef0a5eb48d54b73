"""Recipes: functions that return a complete configuration each. To add one, add a function and a line in RECIPES."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kvgraph.registry import Registry
from kvgraph.train.config import Config, TrainError
from kvgraph.train.recipes.block_attention import block_attention
from kvgraph.train.recipes.graph_kv import graph_kv
from kvgraph.train.recipes.kvlink import kvlink
from kvgraph.train.recipes.smollm2 import smollm2_answers, smollm2_distill, smollm2_sentences, smollm2_unlabelled
from kvgraph.train.recipes.world import world_1hop, world_2hop, world_base, world_mixed


def _wrong(name: str, recipe: Any) -> str:
    """What is wrong with a recipe of another package, or nothing."""
    made = recipe()
    if not isinstance(made, Config):
        return "it doesn't make a kvgraph.train.config.Config"
    return "" if made.name == name else f"the name of its configuration is {made.name!r}"


RECIPES: Registry[Callable[[], Config]] = Registry(
    {
        "kvlink-0": partial(kvlink, 0),
        "kvlink-1": partial(kvlink, 1),
        "kvlink-5": partial(kvlink, 5),
        "kvlink-5-3b": partial(kvlink, 5, "3B"),
        "kvlink-5-no-sum": partial(kvlink, 5, without="no-sum"),
        "kvlink-5-no-sft-mem": partial(kvlink, 5, without="no-sft-mem"),
        "kvlink-5-qa-only": partial(kvlink, 5, without="qa-only"),
        "block-attention": block_attention,
        "graph-kv": graph_kv,
        "smollm2-answers": smollm2_answers,
        "smollm2-distill": smollm2_distill,
        "smollm2-sentences": smollm2_sentences,
        "smollm2-unlabelled": smollm2_unlabelled,
        "world-1hop": world_1hop,
        "world-2hop": world_2hop,
        "world-base": world_base,
        "world-mixed": world_mixed,
    },
    "kvgraph.recipes",
    _wrong,
)
"""Configurations by name. Other packages add some in the group "kvgraph.recipes"; see `kvgraph.registry`."""


def get(name: str) -> Config:
    """The configuration of a recipe. Raises TrainError listing what there is."""
    if name not in RECIPES:
        raise TrainError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
