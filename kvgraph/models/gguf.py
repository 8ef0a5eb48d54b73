"""GGUF files as models: config, tokenizer and chat template from the file, weights dequantised by transformers."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvgraph.errors import ModelError

SUFFIX = ".gguf"
MAGIC, HEADER = b"GGUF", 24  # how a file begins, and the bytes of magic, version and two counts
GgufConfig: Any = getattr(transformers, "GgufConfig", None)


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path is or, being a folder without other weights, holds. Raises ModelError if there are several."""
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise ModelError(f"{path} holds several GGUF files ({', '.join(f.name for f in found)}); give one of them")
    return found[0] if found else None


def check(file: Path) -> None:
    """Raise ModelError for a file that isn't one of GGUF, or ends before its first fields do."""
    with file.open("rb") as opened:
        start = opened.read(HEADER)
    if not start:
        raise ModelError(f"{file} is empty; download it again")
    if start[: len(MAGIC)] != MAGIC:
        raise ModelError(f"{file} is no GGUF file: it doesn't begin with the letters GGUF")
    if len(start) < HEADER:
        raise ModelError(f"{file} ends within its header; download it again")


def refuse_shard(file: Path) -> None:
    """Raise ModelError for one of several files that a model was split into: it lacks the tensors of the others."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("split.count")
    count = 1 if field is None else int(field.parts[field.data[0]][0])
    if count > 1:
        raise ModelError(
            f"it is one of {count} parts of a model; join them with llama.cpp's "
            "`llama-gguf-split --merge FIRST-PART JOINED.gguf` and give the joined file"
        )


@contextmanager
def explained(file: Path) -> Iterator[None]:
    """Replace errors of readers that go beyond the end of a file."""
    try:
        yield
    except (struct.error, IndexError):
        raise ModelError(f"{file} ends within its header; download it again") from None


def source(file: Path | str) -> dict[str, Any]:
    """What tells transformers' `from_pretrained` to read this file, if it is one of GGUF. Raises ModelError: can't be read here."""
    path = Path(file)
    if path.suffix != SUFFIX:
        return {"pretrained_model_name_or_path": str(file)}
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"to read {path.name}, install {' and '.join(missing)}: pip install 'kvgraph[gguf]'")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@contextmanager
def read_once() -> Iterator[None]:
    """transformers reads the whole header, hundreds of thousands of strings, for each of config, weights and tokenizer, and
    makes the table of tensor names once a module. Meanwhile they share one reader and one table; for a small model that is
    most of the time to load it.
    """
    if find_spec("gguf") is None:
        yield
        return
    import gguf

    class HeaderReader(gguf.GGUFReader):
        """Reads from a plain array: a slice of a `np.memmap` costs ten times as much."""

        def _get(self, offset: Any, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = np.asarray(self.data)  # type: ignore[assignment]  # read from here on like an array
            return super()._get(offset, dtype, count, override_order)

    names = "GGUFReader", "get_tensor_name_map"
    plain = [getattr(gguf, name) for name in names]
    reader = lru_cache(maxsize=1)(HeaderReader)
    once = (lambda path, *_: reader(str(path))), lru_cache(maxsize=8)(gguf.get_tensor_name_map)
    try:
        for name, cached in zip(names, once, strict=True):
            setattr(gguf, name, cached)
        yield
    finally:
        for name, original in zip(names, plain, strict=True):
            setattr(gguf, name, original)


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16. Without them torch takes many times as long for
    one as for a product of float32.
    """
    # Older versions of torch tell nothing of ARM. float32 is right there too, only larger.
    asked: Any = getattr(torch.cpu, "get_capabilities", None)
    found = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()} if asked is None else asked()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))  # the last two are ARM's


def dequantised_dtype(device: torch.device) -> torch.dtype:
    """What quantised matrices become: bfloat16, which holds more than they do, where it is fast; else float32."""
    return torch.bfloat16 if device.type != "cpu" or multiplies_bf16() else torch.float32


def load_weights(
    file: Path, config: PreTrainedConfig, dtype: torch.dtype | str, dequantised: torch.dtype
) -> PreTrainedModel:
    """The model with dequantised weights, as if it had been saved like that.

    dtype: "auto" is the file's where its matrices aren't quantised, else `dequantised`. Raises ModelError if a tensor is
    missing, which transformers would fill with random numbers.
    """
    wanted = _plain_dtype(file) or dequantised if dtype == "auto" else dtype
    # transformers may keep weights packed, which nothing here can compose or train.
    packing = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source(file), config=config, dtype=wanted, output_loading_info=True, **packing
    )
    hf, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"it lacks weights, for example {min(info['missing_keys'])}; download it again")
    for owner, name in ((hf.config, "quantization_config"), (hf, "hf_quantizer"), (hf, "quantization_method")):
        if name in vars(owner):  # it isn't quantised any more, and can be saved
            delattr(owner, name)
    model: PreTrainedModel = hf
    return model


def _plain_dtype(file: Path) -> torch.dtype | None:
    """What most of the file's numbers are; None if they are quantised."""
    from gguf import GGMLQuantizationType, GGUFReader

    sizes: Counter[Any] = Counter()
    for tensor in GGUFReader(file).tensors:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    return plain.get(sizes.most_common(1)[0][0])
