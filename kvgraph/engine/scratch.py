"""Memory that a step takes besides weights and KV: what its activations, partial results and logits come to at most.

The default KV budget leaves room for it. It is a bound by the model's sizes, not a measurement, so that it is the same everywhere.
"""

from __future__ import annotations

from torch import nn

from kvgraph.models import Model

LOGITS = 256 << 20  # bytes of float32 logits in a step, at most: scores of a long answer are computed in several steps
MASKED = 64 << 20  # scores and masks that a CPU holds at a time
FLOAT = 4


def most_logits(model: Model) -> int:
    """Tokens of a step that may ask for their logits."""
    return max(64, LOGITS // (FLOAT * model.vocab_size))


def scratch_bytes(model: Model, tokens: int, pairs: int) -> int:
    """Bytes of a step of so many tokens and (token, place) pairs, at most."""
    config, heads, item = model.hf.config, model.heads, model.dtype.itemsize
    head = model.hf.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = [m for m in model.hf.modules() if isinstance(m, nn.Linear) and m is not head]
    widest = max([m.out_features for m in linears] + [getattr(config, "intermediate_size", 0) or 0])
    experts = getattr(config, "num_experts_per_tok", 1) or 1
    sizes = max(layer.key_dim + layer.value_dim for layer in model.layers)
    groups = max(layer.kv_heads for layer in model.layers)
    stream = config.hidden_size * (3 * item + 2 * FLOAT)  # the residual, a norm's input and output, and as float32
    mlp = experts * widest * 4 * item  # gate, its activation, up, and their product
    own = (heads + groups) * sizes * (2 * item + 2 * FLOAT)  # before and after rotation, and as float32
    other = heads * sizes * 3 * FLOAT  # queries chosen and rotated, results and their shares
    logits = (
        min(tokens, most_logits(model)) * model.vocab_size * (item + 2 * FLOAT)
    )  # as computed, float32, log-probabilities
    return int(tokens * (stream + max(mlp, own)) + pairs * other + logits + MASKED)
