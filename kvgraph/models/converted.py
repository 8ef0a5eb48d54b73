"""Copies of what takes long to make of a GGUF file: its weights, maybe with an adapter merged into them, and its tokenizer.

A small model's copy lies in the user's cache folder as safetensors, which load in a fraction of the time. Its name is a
hash of everything it was made from, and it is used only if its bytes are those that were written. It can be deleted at any
time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvgraph import memo
from kvgraph.models.bars import no_bar
from kvgraph.models.checkpoint import save
from kvgraph.models.fingerprint import file_hash, kv_config, whole

LARGEST = 1 << 30  # bytes of weights; a larger model isn't written a second time unasked
COPIES = 4  # that are kept; the one that wasn't used for longest goes
MADE_BY = ("kvgraph", "transformers", "gguf", "peft")
CHECKED = 2  # raised when a check is added: copies made before it may hold what it refuses, such as random weights
ABANDONED = 3600.0  # seconds after which an incomplete copy isn't being written any more
WEIGHTS, FACTS = "model.safetensors", "copy.json"


@dataclass(frozen=True)
class Copy:
    """A place for a converted model."""

    folder: Path

    def read(self) -> tuple[PreTrainedModel, Any] | None:
        """The model and its tokenizer, or None if there is no copy or a damaged one."""
        try:
            facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
            if facts["weights"] != whole(self.folder / WEIGHTS):
                return None
            with no_bar():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder, use_safetensors=True, local_files_only=True
                )
            if facts["config"] != _config_hash(loaded):  # else it would be another model to the store
                return None
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            (self.folder / FACTS).touch()  # used just now
        except Exception:  # whatever is wrong with it, the file itself is still there
            return None
        return loaded, tokenizer

    def write(self, hf: PreTrainedModel, tokenizer: Any) -> None:
        """Keep a model and its tokenizer, if it is small and there is a place for it."""
        if tokenizer is None or sum(t.numel() * t.itemsize for t in hf.parameters()) > LARGEST:
            return
        with suppress(OSError):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(mkdtemp(dir=self.folder.parent))
            try:
                save(hf, made, tokenizer)
                facts = {"weights": whole(made / WEIGHTS), "config": _config_hash(hf)}
                (made / FACTS).write_text(json.dumps(facts), encoding="utf-8")
                shutil.rmtree(self.folder, ignore_errors=True)
                made.rename(self.folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
            self._forget_others()

    def _forget_others(self) -> None:
        there = sorted(self.folder.parent.glob(f"*/{FACTS}"), key=lambda file: file.stat().st_mtime)
        old = [file.parent for file in there[:-COPIES]]
        for folder in self.folder.parent.iterdir():  # what a killed process left
            if not (folder / FACTS).exists() and time.time() - folder.stat().st_mtime > ABANDONED:
                old.append(folder)
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)


def copy_of(file: Path, adapter: Any, dtype: Any, dequantised: Any) -> Copy | None:
    """The place of a converted GGUF file. None where there is no cache folder.

    adapter: what tells the adapter that is merged into it from others (see `adapters.facts_of`), if there is one. dtype,
    dequantised: as `gguf.load_weights` takes them.
    """
    with suppress(RuntimeError):
        facts = [file_hash(file), adapter, str(dtype), str(dequantised), CHECKED, *map(_version, MADE_BY)]
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return Copy(memo.folder() / "gguf" / name)
    return None


def _config_hash(hf: PreTrainedModel) -> str:
    return hashlib.sha256(json.dumps(kv_config(hf), sort_keys=True, default=str).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
