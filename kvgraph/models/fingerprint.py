"""The fingerprint of a model: equal only for models that compute the same KV."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel

from kvgraph import memo
from kvgraph.attention.backends import cpu
from kvgraph.attention.rope import Rotary
from kvgraph.models.adapter import Layer

# Raise it whenever attention or rotation gives other numbers. Old records then become misses. Models whose attention
# multiplies in 16 bits have one of their own: on GPUs, and on CPUs that multiply bfloat16.
ATTENTION_NUMERICS = 1
GPU_16_BIT_NUMERICS = 2
CPU_16_BIT_NUMERICS = 3
QUANTISED_NUMERICS = 1  # the same for products of quantised matrices

# Weight files up to WHOLE bytes are hashed at every load. Of larger ones SAMPLE bytes of every EVERY bytes are, so of each
# tensor of at least EVERY bytes; that is 1/64 of what loading the weights reads anyway.
WHOLE, EVERY, SAMPLE = 64 << 20, 4 << 20, 64 << 10

# Config fields that can't change KV: names, library versions, storage, special tokens, training and output settings.
_NOT_KV = frozenset(
    "_name_or_path transformers_version architectures auto_map dtype torch_dtype kvgraph id2label label2id problem_type"
    " bos_token_id eos_token_id pad_token_id sep_token_id return_dict output_hidden_states output_attentions use_cache "
    "output_router_logits router_aux_loss_coef initializer_range attention_dropout hidden_dropout embd_pdrop "
    "resid_pdrop residual_dropout embedding_dropout classifier_dropout chunk_size_feed_forward tie_word_embeddings "
    "final_logit_softcapping logit_scale logits_scaling".split()
)


def fingerprint_of(
    hf: PreTrainedModel,
    weights: list[str],
    rotaries: tuple[Rotary, ...],
    layers: tuple[Layer, ...],
    adapter: Any = None,
    quantize: str | None = None,
) -> str:
    """SHA-256 of all that can change KV: weights, config, dtype, quantisation, rotation, layers, adapter and our numerics. Not
    the path.
    """
    facts = {
        "numerics": _numerics(hf),
        "weights": sorted(weights),
        "config": kv_config(hf),
        "dtype": str(hf.dtype),
        "rope": [(r.inv_freq.tolist(), r.interleaved) for r in rotaries],
        "layers": [asdict(layer) for layer in layers],
        "adapter": adapter,
    }
    if quantize is not None:
        facts["quantize"] = [quantize, QUANTISED_NUMERICS]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _numerics(hf: PreTrainedModel) -> int:
    if hf.device.type == "cuda" and hf.dtype.itemsize == 2:
        return GPU_16_BIT_NUMERICS
    capped = getattr(hf.config, "attn_logit_softcapping", None)  # whose products are exact
    if hf.device.type == "cpu" and hf.dtype == torch.bfloat16 and not capped and cpu.halves() is not None:
        return CPU_16_BIT_NUMERICS
    return ATTENTION_NUMERICS


def kv_config(hf: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model's config that can change KV."""
    return {k: v for k, v in hf.config.to_dict().items() if k not in _NOT_KV}


def state_hash(hf: PreTrainedModel) -> str:
    h = xxhash.xxh3_128()
    for name, tensor in sorted(hf.state_dict().items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's content. A large file's is remembered by its path, size, times and inode, and by samples."""
    status = path.stat()
    if status.st_size <= WHOLE:
        return whole(path)
    key = str(path.resolve())
    # Sizes and times alone don't tell files apart: layers of images, archives and object stores give them all the same.
    now = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, _sampled(path)]
    known = memo.recall("weights", key)
    if isinstance(known, list) and known[:-1] == now:
        return str(known[-1])
    found = whole(path)
    # A file written this instant could change again under the same time stamps, so it isn't remembered yet.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > 2_000_000_000:
        memo.remember("weights", key, [*now, found])
    return found


def whole(path: Path) -> str:
    """xxh3-128 of all bytes of a file."""
    h = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            h.update(block)
    return h.hexdigest()


def _sampled(path: Path) -> str:
    """Of the first SAMPLE bytes of every EVERY bytes, and of the last SAMPLE bytes."""
    h = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for at in (*range(0, size, EVERY), max(0, size - SAMPLE)):
            file.seek(at)
            h.update(file.read(SAMPLE))
    return h.hexdigest()
