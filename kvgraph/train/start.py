"""The model that the synthetic world's recipe starts from: small, of a standard architecture, with a structured start.

From purely random weights, this model does no better than guessing for a long time. Reading a fact in a document takes
heads that know the tokens just before a token, and heads that find the same words again, and neither helps without the
other. Therefore both exist from the beginning: the previous-token heads are fixed, the others can change, and training
finds the rest. The model has three layers, which is enough to read one fact. For facts that lead to others, the recipes
stack copies of these layers on top (`kvgraph.models.stack`).

Tokens of similar meaning start alike: years differ along one direction by their order. Link tokens start like pronouns, the
same for every document, because they also stand for something that was named before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from kvgraph.data import io
from kvgraph.data.world import tokenizer, world

HIDDEN, LAYERS, HEADS, HEAD_DIM, MLP = 192, 3, 4, 48, 512
THETA = 10000.0
# How far heads of the first layer look back: to a relation and a name of two tokens. In the middle of a question ("serves
# what makes"), the text before a relation is as far away as a name's first token, so it is read like a name.
LOOK_BACK = (1, 2, 3)
SHARP, FREQUENCIES = (
    6.0,
    12,
)  # of the heads that look back: the size of their queries and keys, and the number of angles they use


def write(folder: str | Path, seed: int) -> None:
    """Write the untrained model and its tokenizer as a Hugging Face folder; the same seed gives the same weights."""
    folder = Path(folder)
    tokenizer.write(folder)
    ids = tokenizer.vocabulary()
    config = {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": MLP,
        "vocab_size": len(ids),
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "attention_bias": True,
        "attention_multiplier": HEAD_DIM**-0.5,
        "embedding_multiplier": HIDDEN**0.5,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "tie_word_embeddings": True,
        "bos_token_id": ids[tokenizer.BOS],
        "eos_token_id": ids[tokenizer.EOS],
        "pad_token_id": ids[tokenizer.PAD],
        "dtype": "float32",
    }
    io.write_json(folder / "config.json", config)
    weights = _weights(ids, torch.Generator().manual_seed(seed))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def frozen(hf: Any) -> list[tuple[Tensor, slice]]:
    """Parameters of this model with the rows that are never trained, which say where the heads that look back look."""
    found, rows = [], slice(0, len(LOOK_BACK) * HEAD_DIM)
    for layer in hf.model.layers[::LAYERS]:
        a = layer.self_attn
        found += [(p, rows) for p in (a.q_proj.weight, a.q_proj.bias, a.k_proj.weight, a.k_proj.bias)]
    return found


def _weights(ids: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights under Hugging Face's names for a Granite model, [out, in] each."""

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def orthogonal(size: int) -> Tensor:
        return torch.linalg.qr(normal(size, size, std=1.0))[0]

    weights = {
        "model.embed_tokens.weight": _embeddings(ids, normal),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    strength = [0.1, *[0.25] * (LAYERS - 2), 0.6]  # how much of its input a layer copies
    for i in range(LAYERS):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        query, value = orthogonal(HIDDEN) * 0.8, orthogonal(HIDDEN)
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{attention}.q_proj.weight": query,
            f"{attention}.k_proj.weight": query.clone(),  # a token finds equal tokens
            f"{attention}.v_proj.weight": value,
            f"{attention}.o_proj.weight": value.T.contiguous() * strength[i],  # and copies them unchanged
            **{f"{attention}.{name}_proj.bias": torch.zeros(HIDDEN) for name in "qkvo"},
            f"{layer}.mlp.gate_proj.weight": normal(MLP, HIDDEN, std=HIDDEN**-0.5),
            f"{layer}.mlp.up_proj.weight": normal(MLP, HIDDEN, std=HIDDEN**-0.5),
            f"{layer}.mlp.down_proj.weight": normal(HIDDEN, MLP, std=0.15 * MLP**-0.5),
        }
    _look_back(weights, normal(HIDDEN, HEAD_DIM, std=0.8 * HIDDEN**-0.5))
    return weights


def _embeddings(ids: Mapping[str, int], normal: Callable[..., Tensor]) -> Tensor:
    """[vocabulary, HIDDEN] of length about 1, random except for years and link tokens."""
    rows = normal(len(ids), HIDDEN, std=HIDDEN**-0.5)
    years = [ids[year] for year in world.YEARS]
    rows[years] += torch.linspace(-1, 1, len(years))[:, None] * normalize(normal(HIDDEN, std=1.0), dim=0)
    pronoun = normalize(rows[[ids[word] for word in ("She", "firm", "city")]].sum(0), dim=0)
    links = [ids[f"<link_{i}>"] for i in range(tokenizer.LINKS)]
    alike = normalize(pronoun + 0.7 * normal(tokenizer.LINKS_EACH, HIDDEN, std=HIDDEN**-0.5), dim=1)
    rows[links] = alike.repeat(len(links) // len(alike), 1)
    return rows


def _look_back(weights: dict[str, Tensor], out: Tensor) -> None:
    """Set the heads that look back by their biases alone, and let the next layer match their output.

    out [HIDDEN, HEAD_DIM]: the subspace they all write to. A query rotated back by n positions looks exactly n tokens back.
    """
    value = weights["model.layers.0.self_attn.v_proj.weight"][:HEAD_DIM].clone()
    angles = THETA ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    key = torch.zeros(HEAD_DIM)
    key[:FREQUENCIES] = SHARP
    x, y = key.chunk(2)
    attention = "model.layers.0.self_attn"
    q, k, v, o = (weights[f"{attention}.{name}_proj.weight"] for name in "qkvo")
    for head, distance in enumerate(LOOK_BACK):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        cos, sin = (angles * distance).cos().float(), (angles * distance).sin().float()
        q[rows] = k[rows] = 0.0
        weights[f"{attention}.q_proj.bias"][rows] = torch.cat([x * cos + y * sin, y * cos - x * sin])
        weights[f"{attention}.k_proj.bias"][rows] = key
        v[rows] = value
        o[:, rows] = out
    written = torch.linalg.qr(out)[0]
    attention = "model.layers.1.self_attn"
    matched = weights[f"{attention}.q_proj.weight"] @ written @ written.T * 1.4
    weights[f"{attention}.q_proj.weight"] = matched
    weights[f"{attention}.k_proj.weight"] = matched.clone()
