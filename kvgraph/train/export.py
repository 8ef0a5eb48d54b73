"""A trained model as an ordinary Hugging Face folder: from a run, one of its checkpoints, or another trainer's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvgraph import models
from kvgraph.train import checkpoint, model
from kvgraph.train.config import Config, TrainError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Parts of Hugging Face's parameter names, and their names in torchtune's and torchtitan's Llama. KVLink's code trains
# torchtune's model.
TORCHTUNE = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.layers.": "layers.",
    "model.norm.weight": "norm.scale",
    "lm_head.": "output.",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.": "attn.",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
TORCHTITAN = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.layers.": "layers.",
    "model.norm.weight": "norm.weight",
    "lm_head.": "output.",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
NAMINGS: tuple[dict[str, str], ...] = ({}, TORCHTUNE, TORCHTITAN)


def export(source: str | Path, out: str | Path, *, base: str | None = None, dtype: str | None = None) -> Path:
    """Write the model of a run's folder (its latest checkpoint), of a checkpoint, or of a torch.distributed.checkpoint
    folder to a new folder `out`. Returns the checkpoint or folder it was made from.

    base: for a torch.distributed.checkpoint folder, the model it was trained from, which provides configuration and
        tokenizer; for a run, the present place of its base model.
    dtype: float32, bfloat16 or float16 [default: the base model's].
    Use torch.distributed.checkpoint folders only from people you trust: PyTorch reads their index with pickle.
    Raises TrainError or ModelError with the reason.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise TrainError(f"dtype is {dtype!r}; there are {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainError(f"{out} is there already; give a new folder")
    found = _checkpoint(source)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if found is None:
            _foreign(source, unfinished, base, dtype)
        elif dtype is None:
            shutil.copytree(found / checkpoint.MODEL, unfinished)
        else:
            _own(found, unfinished, DTYPES[dtype], base)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return found or source


def _checkpoint(source: Path) -> Path | None:
    """The checkpoint that a folder stands for; None if the folder itself is one of torch.distributed.checkpoint."""
    if (source / ".metadata").is_file():
        inside = source.name == checkpoint.STATE and (source.parent / checkpoint.MODEL).is_dir()
        return source.parent if inside else None
    if (source / checkpoint.MODEL).is_dir() and (source / checkpoint.STATE).is_dir():
        return source
    if found := checkpoint.found(source):
        return found[-1]
    raise TrainError(
        f"{source} is neither a run's folder, nor a checkpoint, nor a folder with .metadata and *.distcp files"
    )


def _own(folder: Path, out: Path, dtype: torch.dtype, base: str | None) -> None:
    """From the float32 weights of a checkpoint. base: the present place of the model it was trained from, if that has moved."""
    config = Config.read(folder / checkpoint.CONFIG)
    student = model.build(replace(config, model=base) if base else config)
    checkpoint.check_base(folder, student.base)
    weights = {name: torch.empty_like(p) for name, p in student.module.named_parameters() if p.requires_grad}
    checkpoint.read_tensors(folder / checkpoint.STATE, {"weights": weights})
    model.save(student, weights, out, dtype)


def _foreign(source: Path, out: Path, base: str | None, dtype: str | None) -> None:
    """From a torch.distributed.checkpoint folder of any trainer that uses Hugging Face's, torchtune's or torchtitan's names."""
    if base is None:
        raise TrainError(f"{source} holds weights alone; give the model it was trained from with --base")
    loaded = models.load(base)
    sizes = checkpoint.sizes(source)
    expected = dict(loaded.hf.named_parameters())
    keys, renamed = _keys(list(expected), sizes, source)
    config = loaded.hf.config
    if renamed and config.model_type != "llama":
        raise TrainError(
            f"{source} has torchtune's or torchtitan's names, which are known for llama, not {config.model_type}"
        )
    for name, key in keys.items():
        if sizes[key] != expected[name].shape:
            raise TrainError(
                f"{key} in {source} has the shape {list(sizes[key])}, but {name} of {base} {list(expected[name].shape)}"
            )
    read = {keys[name]: torch.empty_like(p, dtype=torch.float32) for name, p in expected.items()}
    checkpoint.read_tensors(source, read)
    weights = {name: read[key] for name, key in keys.items()}
    if renamed:
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        for name, weight in weights.items():
            if count := heads.get(".".join(name.split(".")[-2:])):
                weights[name] = _halves(weight, count)
    if head := _leftover(keys, sizes, source):
        _untie(loaded.hf, weights, head, source)
    models.save(loaded.hf, out, loaded.tokenizer, weights=weights, dtype=DTYPES[dtype] if dtype else loaded.dtype)


def _leftover(keys: dict[str, str], there: Any, source: Path) -> str:
    """The key of an output head that the base shares with its embedding; "" where there is none.

    Raises TrainError if the checkpoint has other weights that the base has no place for.
    """
    used = set(keys.values())
    name, key = next(iter(keys.items()))
    naming = next(n for n in NAMINGS if key.endswith(_renamed(name, n)))
    prefix = key.removesuffix(_renamed(name, naming))
    head = prefix + _renamed("lm_head.weight", naming)
    roots = {prefix + _renamed(n, naming).split(".")[0] for n in keys}
    rest = [k for k in there if k not in used and k.startswith(tuple(f"{root}." for root in roots)) and k != head]
    rest = [k for k in rest if not k.endswith(("inv_freq", "freqs_cis"))]  # tables, not weights
    if rest:
        raise TrainError(f"{source} has weights that the base has no place for, for example {min(rest)}")
    return head if head in there and head not in used else ""


def _untie(hf: Any, weights: dict[str, Tensor], head: str, source: Path) -> None:
    """Give the model an output head of its own if the checkpoint's differs from its embedding."""
    embedding = "model.embed_tokens.weight"
    read = {head: torch.empty_like(weights[embedding])}
    checkpoint.read_tensors(source, read)
    if torch.equal(read[head], weights[embedding]):
        return
    hf.config.tie_word_embeddings = False
    output = hf.get_output_embeddings()
    output.weight = torch.nn.Parameter(read[head])
    weights["lm_head.weight"] = read[head]


def _keys(names: list[str], there: Any, source: Path) -> tuple[dict[str, str], bool]:
    """(the key of every parameter, whether the names aren't Hugging Face's). All names may share one more prefix."""
    best: list[str] = names
    for naming in NAMINGS:
        wanted = {name: _renamed(name, naming) for name in names}
        first = wanted[names[0]]
        for prefix in {key.removesuffix(first) for key in there if key.endswith(first)}:
            keys = {name: prefix + key for name, key in wanted.items()}
            missing = [key for key in keys.values() if key not in there]
            if not missing:
                return keys, bool(naming)
            best = min(best, missing, key=len)
    raise TrainError(f"{source} lacks {len(best)} of {len(names)} weights, for example {best[0]}")


def _renamed(name: str, naming: dict[str, str]) -> str:
    for part, other in naming.items():
        name = name.replace(part, other)
    return name


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Convert a query or key matrix [heads * D, hidden] from rotating neighbouring pairs (torchtune, torchtitan) to rotating
    the two halves of a head (Hugging Face).
    """
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)
