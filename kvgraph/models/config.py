"""What a model's config and its model card say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvgraph.data.chat import end_of_turn
from kvgraph.errors import ModelError


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope parameters of a config: one dict, or one for every layer type."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [r for r in rope.values() if isinstance(r, dict)]
    return nested or [rope]


def limit_of(config: PreTrainedConfig) -> int:
    """Positions the model may use. With YaRN, the config's original length times its factor."""
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        raise ModelError("the model's config gives no max_position_embeddings")
    for rope in rope_parameters(config):
        if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return int(limit)


def vocabulary_of(hf: PreTrainedModel) -> int:
    return cast(nn.Embedding, hf.get_input_embeddings()).weight.shape[0]


def end_ids(hf: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, by whatever names one: generation config, config, tokenizer and chat template."""
    configs = (getattr(hf, "generation_config", None), hf.config, tokenizer)
    named = [getattr(config, "eos_token_id", None) for config in configs]
    each = [ids if isinstance(ids, list | tuple) else [ids] for ids in (*named, end_of_turn(tokenizer))]
    return tuple(dict.fromkeys(i for ids in each for i in ids if i is not None))


def declared(data: dict[str, Any], where: str) -> tuple[str, ...]:
    """The methods a config or card declares tuning for."""
    entry = data.get("kvgraph") or {}
    methods = entry.get("tuned_for", []) if isinstance(entry, dict) else None
    if not isinstance(methods, list) or not all(isinstance(m, str) for m in methods):
        raise ModelError(f'{where}: its "kvgraph" entry must look like {{"tuned_for": ["block"]}}')
    return tuple(methods)


def card(folder: Path) -> dict[str, Any]:
    """The front matter of a model card; empty if there is none or it can't be read, because it is only a note."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(path)
    except Exception as error:
        warnings.warn(
            f"{path}: its front matter can't be read ({type(error).__name__}), so it declares nothing", stacklevel=2
        )
        return {}
    return data if isinstance(data, dict) else {}
