"""One preparation: rows of a source become training records in a folder; resumable at any moment.

The folder holds `train.jsonl`, `validation.jsonl` and `prepared.json`. The last one says what is prepared, where to resume,
and how long the two files were then. Anything a killed process wrote after that is cut off and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvgraph
from kvgraph.data import io
from kvgraph.errors import KVGraphError
from kvgraph.train.prepare.rows import Reader
from kvgraph.train.prepare.source import Made, Outcome, PrepareError, PrepareJob, Source
from kvgraph.train.prepare.tokens import Tokens
from kvgraph.train.records import PREPARED, SPLITS, TRAIN, VALIDATION, prepared, texts

FORMAT = 1
SAVED_EVERY, SAVED_BYTES = 2.0, 8 << 20  # seconds and bytes between two saved states
COUNTS = ("records", "documents", "characters", "tokens")

State = dict[str, Any]
"""The contents of prepared.json."""


def prepare(
    source: Source,
    reader: Reader,
    out: str | Path,
    *,
    tokenizer: Tokens | None = None,
    settings: Mapping[str, str] | None = None,
    seed: int = 0,
    validation: float = 0.01,
    limit: int | None = None,
    on_progress: Callable[[State], None] = lambda state: None,
    say: Callable[[str], None] = lambda text: None,
) -> State:
    """Prepare a source in folder `out`, or resume an earlier call; returns the contents of prepared.json.

    validation: the share of documents whose records are for validation. limit: stop after this many records; those made of
    one raw record stay together, and a later call with a larger limit continues. on_progress is called after every raw
    record, `say` with a source's messages for people.

    Raises PrepareError if the folder holds other data, if a raw record can't be read (records made before it are kept),
    and if files can't be written.
    """
    if not 0 <= validation < 1:
        raise PrepareError(f"the share for validation is {validation}; it must be at least 0 and less than 1")
    if source.needs_tokenizer and tokenizer is None:
        raise PrepareError(f"{source.name} counts tokens; give --tokenizer, a model's folder or hub name")
    chosen = _settings(source, settings or {})
    folder = Path(out)
    with io.errors_named(folder, PrepareError), io.locked(folder, PrepareError):
        state = _begin(folder, _described(source, reader, tokenizer, chosen, seed, validation), limit)
        if state["finished"]:
            return state
        job = PrepareJob(seed, tokenizer, folder, chosen, reader.rows, say)
        files = _Files(folder, state)
        try:
            for outcome in source.outcomes(reader.rows(state["position"]), job):
                files.add(outcome, tokenizer)
                on_progress(state)
                if limit is not None and _records(state) >= limit:
                    break
            else:
                state |= {"exhausted": True, "position": None}
            state["finished"] = True
        except KVGraphError:
            files.save()
            raise
        files.save()
        return state


def revision(folder: Path) -> str | None:
    """The commit of the hub that a folder is prepared from, if any."""
    found = prepared(folder)["source"].get("revision") if (folder / PREPARED).is_file() else None
    return None if found is None else str(found)


def _settings(source: Source, given: Mapping[str, str]) -> dict[str, str]:
    """All settings of a source: those given, else their defaults."""
    if unknown := sorted(set(given) - set(source.settings)):
        known = ", ".join(source.settings) or "none"
        raise PrepareError(f"{source.name} has no setting {unknown[0]!r}; there are: {known}")
    return {name: given.get(name, setting.default) for name, setting in source.settings.items()}


def _described(
    source: Source, reader: Reader, tokenizer: Tokens | None, settings: Mapping[str, str], seed: int, validation: float
) -> State:
    """The part of prepared.json that determines the data and mustn't change."""
    return {
        "format": FORMAT,
        "name": source.name,
        "source": dict(reader.identity),
        "seed": seed,
        "validation": validation,
        "tokenizer": None if tokenizer is None else {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "settings": {name: value for name, value in settings.items() if source.settings[name].changes},
    }


def _begin(folder: Path, described: State, limit: int | None) -> State:
    """The state to start with: a new one, or the one that an earlier call for the same data left."""
    path = folder / PREPARED
    if not path.is_file():
        if any((folder / f"{split}.jsonl").exists() for split in SPLITS):
            raise PrepareError(f"{folder} has records but no {PREPARED} that says what they are; give another folder")
        return described | {
            "versions": {
                "kvgraph": kvgraph.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("datasets", "tokenizers")},
            },
            "limit": limit,
            "finished": False,
            "exhausted": False,
            "position": None,
            "bytes": dict.fromkeys(SPLITS, 0),
            "counts": {
                "read": 0,
                **{split: dict.fromkeys(COUNTS, 0) for split in SPLITS},
                "skipped": {},
            },
        }
    state = prepared(folder)
    for name, now in described.items():
        before = state.get(name)
        if _compared(before) != _compared(now):
            raise PrepareError(
                f"{folder} holds data with {name} = {json.dumps(before)[:100]}, not {json.dumps(now)[:100]}; "
                "give another folder, or delete it"
            )
    if limit is not None and (state["limit"] is None or limit < state["limit"]):
        more = "all records" if state["limit"] is None else f"{state['limit']:,} records"
        raise PrepareError(f"{folder} is prepared for {more}; give another folder for {limit:,}")
    state["limit"] = limit
    state["finished"] = state["exhausted"] or (limit is not None and _records(state) >= limit)
    return state


def _compared(value: Any) -> Any:
    """A tokenizer's identity, without its name."""
    return value["sha256"] if isinstance(value, dict) and "sha256" in value else value


def _records(state: State) -> int:
    """Records written for both splits."""
    return sum(state["counts"][split]["records"] for split in SPLITS)


class _Files:
    """The two files of records and the state that goes with them, written together now and then."""

    def __init__(self, folder: Path, state: State):
        self.folder, self.state = folder, state
        self.pending = {split: bytearray() for split in SPLITS}
        self.saved = time.monotonic()
        for split, size in state["bytes"].items():
            path = folder / f"{split}.jsonl"
            with open(path, "ab") as file:
                if file.tell() < size:
                    raise PrepareError(f"{path} is shorter than before; give another folder, or delete this one")
                file.truncate(size)
        io.write_json(folder / PREPARED, state)

    def add(self, outcome: Outcome, tokenizer: Tokens | None) -> None:
        """Count an outcome, and hold its records until they are written."""
        row, counts = outcome.row, self.state["counts"]
        split = VALIDATION if share(outcome.key) < self.state["validation"] else TRAIN
        try:
            lines = [io.line({"id": self._id(row.number, i), **made}) for i, made in enumerate(outcome.made)]
            skipped = outcome.skipped
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair; tokenizers can't read it
            lines, skipped = [], "text that isn't Unicode"
        if skipped:
            counts["skipped"][skipped] = counts["skipped"].get(skipped, 0) + 1
        for made, line in zip(outcome.made, lines, strict=False):
            self.pending[split] += line
            for name, number in _sizes(made, tokenizer).items():
                counts[split][name] += number
        counts["read"] += 1
        self.state["position"] = row.position
        if time.monotonic() - self.saved > SAVED_EVERY or sum(map(len, self.pending.values())) > SAVED_BYTES:
            self.save()

    def _id(self, number: int, i: int) -> str:
        return f"{self.state['name']}-{number}" + (f".{i}" if i else "")

    def save(self) -> None:
        """Write pending records, then the state. After an error (a full disk) the files still agree with the state on disk."""
        for split, lines in self.pending.items():
            _append(self.folder / f"{split}.jsonl", lines)
            self.state["bytes"][split] += len(lines)
        io.write_json(self.folder / PREPARED, self.state)
        self.pending = {split: bytearray() for split in SPLITS}
        self.saved = time.monotonic()


def share(key: str) -> float:
    """A number in [0, 1) that depends only on the words of a text. Below the validation share, it is for validation.

    Therefore it is the same in every folder, whatever the order, the source and the seed.
    """
    digest = hashlib.sha256(" ".join(key.split()).encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _sizes(made: Made, tokenizer: Tokens | None) -> dict[str, int]:
    """The amounts that a record adds to the counts."""
    found = list(texts(made))
    return {
        "records": 1,
        "documents": len(made.get("documents", ())),
        "characters": sum(map(len, found)),
        "tokens": 0 if tokenizer is None else sum(map(tokenizer.count, found)),
    }


def _append(path: Path, content: bytearray) -> None:
    with open(path, "ab", buffering=0) as file:
        io.append(file, content)
        os.fsync(file.fileno())
