"""Causal LMs as the engine and training see them. The only room that imports transformers."""

import sys

from kvgraph.errors import ModelError

if sys.flags.optimize > 1:
    raise ModelError(
        "transformers needs its docstrings, which PYTHONOPTIMIZE=2 (python -OO) leaves out; unset it or set it to 1"
    )

from kvgraph.models.adapter import Attend, Layer, Model, Trainable  # noqa: E402
from kvgraph.models.checkpoint import deepen, save  # noqa: E402
from kvgraph.models.fingerprint import ATTENTION_NUMERICS  # noqa: E402
from kvgraph.models.loading import load, load_tokenizer, trainable, tuned_for, wrap  # noqa: E402
from kvgraph.models.support import TESTED  # noqa: E402

__all__ = [
    "ATTENTION_NUMERICS",
    "TESTED",
    "Attend",
    "Layer",
    "Model",
    "Trainable",
    "deepen",
    "load",
    "load_tokenizer",
    "save",
    "trainable",
    "tuned_for",
    "wrap",
]
