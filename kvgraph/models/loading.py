"""Loading a causal LM from a folder, the hub or memory, with checks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvgraph import garbage
from kvgraph.errors import ModelError
from kvgraph.models import adapters, bars, converted, gguf, matrices
from kvgraph.models.adapter import IMPLEMENTATION, Model, Trainable
from kvgraph.models.angles import exact_angles
from kvgraph.models.config import card, declared
from kvgraph.models.fingerprint import file_hash, fingerprint_of, state_hash
from kvgraph.models.observe import plain_logits, probe, require_equal
from kvgraph.models.support import TESTED, refuse

# Given wherever anything is loaded: else transformers asks on the terminal whether it may run the Python of a folder.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
LFS = b"version https://git-lfs.github.com/spec/"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@garbage.not_collected()
def load(
    path_or_name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    device: str | torch.device = "cpu",
    allow_untested: bool = False,
) -> Model:
    """Load a causal LM from a folder or hub name with safetensors weights, or from a GGUF file or a folder with one.

    adapter: the folder or hub name of a LoRA adapter as PEFT writes it, to merge into the weights. A folder that holds an
    adapter alone stands for its base with it. dtype: "auto" (the checkpoint's; for quantised GGUF files bfloat16, or float32 on
    a CPU without instructions for it), "float32", "float16", "bfloat16" or a torch dtype. quantize: "int8" or "int4" for the
    matrices (see `kvgraph.models.matrices`), in bfloat16, on a CPU. The tokenizer is None when the folder has none. allow_untested: accept model types
    that kvgraph doesn't test; what can be checked still is.
    Raises ModelError with the reason.
    """
    shown, target = str(path_or_name), _device(device)
    wanted = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted != "auto" and wanted not in _DTYPES.values():
        raise ModelError(f"dtype {dtype} isn't supported; use auto, {', '.join(_DTYPES)}")
    quantize = matrices.checked(quantize, wanted, target)
    if quantize:
        wanted = torch.bfloat16
    name = shown
    if adapters.is_adapter(Path(name).expanduser()):
        if adapter is not None:
            raise ModelError(f"{name} is an adapter itself; give the model that it is for, and one adapter")
        adapter, name = name, adapters.base_of(adapters.folder_of(name))
    merging = None if adapter is None else adapters.folder_of(adapter)
    file = gguf.gguf_in(Path(name).expanduser())
    facts = None if merging is None else adapters.facts_of(merging)
    dequantised = gguf.dequantised_dtype(target)
    copy = converted.copy_of(file, facts, wanted, dequantised) if file else None
    if file and copy and (copied := copy.read()) is not None:
        (hf, tokenizer), folder, files = copied, file.parent, [file]
        refuse(hf.config, allow_untested)
    else:
        told = nullcontext() if name == shown else one_line(f"{shown} holds an adapter of {name}")
        with told, gguf.read_once() if file else nullcontext():
            hf, folder, files = (
                _from_gguf(file, wanted, dequantised, allow_untested)
                if file
                else _from_folder(name, wanted, allow_untested)
            )
            tokenizer = _tokenizer(file or folder, name)
        if merging is not None:
            hf = adapters.merged(hf, merging)
        if copy:
            copy.write(hf, tokenizer)
    with one_line(f"can't put {name} on {target}"):
        hf.to(target)  # type: ignore[arg-type]  # stubs know no device of text
    if quantize:
        matrices.quantise(hf, quantize)
    model = _build(hf, tokenizer, shown, [file_hash(f) for f in files], allow_untested, facts, quantize)
    for carded in filter(None, (folder, merging)):
        try:
            model.tuned_for += declared(card(carded), f"the model card in {carded}")
        except ModelError as error:
            warnings.warn(f"{error}; until then it declares nothing", stacklevel=2)
    model.tuned_for = tuple(dict.fromkeys(model.tuned_for))
    garbage.started()
    return model


_Loaded = tuple[PreTrainedModel, Path, list[Path]]  # the model, its folder, and the files that its weights are in


def _from_gguf(file: Path, wanted: Any, dequantised: torch.dtype, allow_untested: bool) -> _Loaded:
    _refuse_pointers([file], str(file.parent))
    gguf.check(file)
    with one_line(f"can't read the config of {file}"), gguf.explained(file):
        described = gguf.source(file)
        gguf.refuse_shard(file)
        config = AutoConfig.from_pretrained(**described)
    refuse(config, allow_untested)
    with one_line(f"can't load {file}"), _shapes_explained():
        return gguf.load_weights(file, config, wanted, dequantised), file.parent, [file]


def _from_folder(name: str, wanted: Any, allow_untested: bool) -> _Loaded:
    local = Path(name).expanduser().is_dir()
    if local and not (Path(name).expanduser() / "config.json").is_file():
        raise ModelError(f"{name} has no config.json; give the folder of a saved transformers model")
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}")
    source = str(Path(name).expanduser()) if local else name
    with one_line(f"can't read the config of {name}" + ("" if local else " (no such folder; tried as a hub name)")):
        config = AutoConfig.from_pretrained(source, **NO_CODE)
    refuse(config, allow_untested)
    if not local:
        from huggingface_hub import snapshot_download

        with one_line(f"can't get {name} from the hub"):
            kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            source = snapshot_download(name, allow_patterns=kinds, ignore_patterns=["*/*", "consolidated*"])
    files = weight_files(Path(source), name)
    with one_line(f"can't load {name}"), _shapes_explained(), bars.loading(files):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    hf, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"{name} lacks weights, for example {min(info['missing_keys'])}; is the download complete?")
    return hf, Path(source), files


def wrap(
    hf_model: PreTrainedModel, tokenizer: Any = None, *, name: str | None = None, allow_untested: bool = False
) -> Model:
    """A Model of a transformers model that is already in memory. Its fingerprint hashes the current state dict.

    Don't change its weights, dtype or device afterwards. Raises ModelError with the reason if it isn't supported.
    """
    refuse(hf_model.config, allow_untested)
    shown = name or hf_model.config.name_or_path or type(hf_model).__name__
    return _build(hf_model, tokenizer, shown, [state_hash(hf_model)], allow_untested)


def trainable(hf_model: PreTrainedModel, *, allow_untested: bool = False) -> Trainable:
    """Prepare a transformers model in memory for training through plans. Its train or eval mode stays as it is.

    Afterwards it can only run through `Trainable.forward`, also when activation checkpointing runs a layer again.
    `hf_model.set_attn_implementation("sdpa")` undoes that. Raises ModelError with the reason if it isn't supported.
    """
    refuse(hf_model.config, allow_untested)
    was_training = hf_model.training
    name = hf_model.config.name_or_path or type(hf_model).__name__
    layers = _build(hf_model, None, name, [], allow_untested).layers
    hf_model.train(was_training)
    hf_model.config._attn_implementation = IMPLEMENTATION
    return Trainable(hf_model, layers)


def tuned_for(path_or_name: str | Path) -> tuple[str, ...]:
    """The methods that the config and card in a folder, or a hub name's config, declare tuning for.

    Nothing else of the model is read. Empty if there is no config, as in a folder with a tokenizer only.
    """
    folder = Path(path_or_name).expanduser()
    try:
        config = AutoConfig.from_pretrained(str(folder if folder.is_dir() else path_or_name), **NO_CODE).to_dict()
    except (OSError, ValueError):
        config = {}
    found = declared(config, f"{path_or_name}'s config")
    return found + (declared(card(folder), f"{path_or_name}'s model card") if folder.is_dir() else ())


def load_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer of a folder or hub name, without the model's weights. Raises ModelError with the reason."""
    name = str(path_or_name)
    folder = Path(name).expanduser()
    if adapters.is_adapter(folder):
        return load_tokenizer(adapters.base_of(folder))
    file = gguf.gguf_in(folder)
    if not file and not folder.is_dir():
        with one_line(f"can't get the tokenizer of {name} (no such folder; tried as a hub name)"):
            return AutoTokenizer.from_pretrained(name, **NO_CODE)
    tokenizer = _tokenizer(file or folder, name)
    if tokenizer is None:
        raise ModelError(f"{name} has no tokenizer")
    return tokenizer


def _build(
    hf: PreTrainedModel,
    tokenizer: Any,
    name: str,
    weights: list[str],
    allow_untested: bool,
    adapter: Any = None,
    quantize: str | None = None,
) -> Model:
    if hf.dtype not in _DTYPES.values():
        raise ModelError(f"{name} is in {hf.dtype}, which isn't supported; use {', '.join(_DTYPES)}")
    hf.train(False)
    tested = hf.config.model_type in TESTED
    with nullcontext() if tested else one_line(f"{name} can't be run"):
        plain = None if tested else plain_logits(hf)
        rotaries, layers = probe(hf, exact_angles(hf))
        fingerprint = fingerprint_of(hf, weights, rotaries, layers, adapter, quantize)
        model = Model(hf, tokenizer, name, fingerprint, rotaries, layers)
        if plain is not None:
            require_equal(model, *plain)
    return model


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that transformers will load from a folder."""
    _refuse_pointers(folder.glob("*"), name)
    if (folder / adapters.CONFIG).exists():
        raise ModelError(
            f"{name} holds a model and an adapter; give the adapter a folder of its own, or merge it into the model"
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        with one_line(f"can't read {index}"):
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} has no weight map")
        files = [folder / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{name} lacks {file.name}; is the download complete?")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{name} has only pickled weights, which can run code when loaded; save it as safetensors first"
        )
    if found := sorted(folder.glob(f"*{gguf.SUFFIX}")):
        raise ModelError(f"{name} has a config.json, but no model.safetensors; give its GGUF file, {found[0]}")
    raise ModelError(f"{name} has no model.safetensors")


def _refuse_pointers(files: Iterable[Path], name: str) -> None:
    """Raise ModelError for files cloned without Git LFS, which leaves a note of three lines in place of each."""
    for file in sorted(files):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            raise ModelError(
                f"{name} holds only a Git LFS pointer in place of {file.name}; run `git lfs pull` there, or download it again"
            )


def _tokenizer(folder: Path, name: str) -> Any:
    _refuse_pointers(folder.glob("*"), name)
    if folder.is_dir() and not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        return None
    with one_line(f"can't load the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(**gguf.source(folder), **NO_CODE)


def _device(device: str | torch.device) -> torch.device:
    with one_line(f"unknown device {device}"):
        target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} isn't available: torch sees no GPU here")
    if target.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device} isn't supported; use cpu or cuda")
    return target


@contextmanager
def _shapes_explained() -> Iterator[None]:
    """Replace transformers' error about shapes, which refers to a report that is never shown."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError("its weights don't have the shapes given by its config.json") from None
        raise


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn any exception of a library into a ModelError of one line; they have no common base class."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from None
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what}: it needs Python code that it brings along (auto_map), and kvgraph never runs a model's code; "
                "use a model of a type that transformers has itself"
            ) from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {lines[0]}") from None
