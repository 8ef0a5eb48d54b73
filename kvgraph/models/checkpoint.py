"""Models as folders: saving one, and stacking layers on a model before further training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraph.errors import ModelError
from kvgraph.models.bars import no_bar


def stack(hf_model: PreTrainedModel, count: int) -> None:
    """Put copies of a transformers model's last `count` layers on top of it, which process their own output once more.

    Raises ModelError if the model has fewer layers.

    Source: progressive stacking (Gong et al., Efficient Training of BERT by Progressively Stacking, ICML 2019).
    """
    layers, config = hf_model.model.layers, hf_model.config
    if not 0 < count <= len(layers):
        raise ModelError(f"the model has {len(layers)} layers, so {count} can't be copied")
    for layer in list(layers)[-count:]:
        configs = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}  # stay the model's own
        above = copy.deepcopy(layer, configs)
        above.self_attn.layer_idx = len(layers)
        layers.append(above)
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *config.layer_types[-count:]]
    config.num_hidden_layers = len(layers)


def save(
    hf_model: PreTrainedModel,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a transformers model and its tokenizer as an ordinary folder with safetensors weights, which `load` reads.

    weights: by parameter name, to write instead of the model's own.
    dtype: of the files (default: the model's).

    Raises OSError or SafetensorError if they can't be written.
    """
    folder, dtype = Path(folder), dtype or hf_model.dtype
    if weights is None:
        kept = hf_model.state_dict().keys()
        weights = {name: t for name, t in (*hf_model.named_parameters(), *hf_model.named_buffers()) if name in kept}
    with no_bar():
        hf_model.save_pretrained(folder, state_dict={name: t.detach().to(dtype) for name, t in weights.items()})
    config = folder / "config.json"  # it has the dtype of the model in memory
    said = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
