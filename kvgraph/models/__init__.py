"""Causal LMs as the engine and training see them. Only this package imports transformers."""

import sys

from kvgraph.errors import ModelError

if sys.flags.optimize > 1:
    raise ModelError(
        "transformers needs its docstrings, which PYTHONOPTIMIZE=2 (python -OO) leaves out; unset it or set it to 1"
    )

from kvgraph.garbage import not_collected

with not_collected():
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401  # these two import nearly all that a model needs

from kvgraph.models.adapter import Attend, Layer, Model, Trainable
from kvgraph.models.checkpoint import save, stack
from kvgraph.models.fingerprint import ATTENTION_NUMERICS
from kvgraph.models.loading import load, load_tokenizer, trainable, tuned_for, wrap
from kvgraph.models.matrices import order
from kvgraph.models.support import TESTED

__all__ = [
    "ATTENTION_NUMERICS",
    "TESTED",
    "Attend",
    "Layer",
    "Model",
    "Trainable",
    "load",
    "load_tokenizer",
    "order",
    "save",
    "stack",
    "trainable",
    "tuned_for",
    "wrap",
]
