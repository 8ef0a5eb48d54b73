"""`kvgraph tune`: documents as prompts, questions that depend on them, and the command from documents to adapter."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from kvgraph import Engine, models
from kvgraph.cli import main
from kvgraph.data.corpus import CorpusDocument as Document
from kvgraph.train import gap, tune
from kvgraph.train.config import TrainError
from kvgraph.train.forward import logits
from kvgraph.train.records import Records
from kvgraph.train.trainer import TrainResult
from train_runs import write_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*multi-threaded, use of fork",
        ".*is deprecated and will be removed",
        ".*torch.distributed is disabled",
    )
]

MEASURED = "On held-out documents, before and after:"  # in the card of every adapter that `tune` made


def text(seed: int, words: int) -> str:
    rng = random.Random(seed)
    known = "the guild dug a harbour in the town and the river feeds it where ships lie".split()
    parts = [" ".join(rng.choice(known) for _ in range(rng.randint(10, 50))) for _ in range(words // 30)]
    return "\n\n".join(f"Part {seed}-{i}. {part}" for i, part in enumerate(parts))


def folder(path: Path, files: int = 10, words: int = 300) -> Path:
    path.mkdir()
    for i in range(files):
        (path / f"file-{i}.txt").write_text(text(i, words))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def documents(files: int, words: int = 600) -> list[Document]:
    return [Document(text(i, words), f"file-{i}.txt", "") for i in range(files)]


def test_passages_hold_every_word_once_and_are_short():
    found = tune.passages_of(documents(4))
    told = [word for p in found for word in p.text.split()]
    assert told == [word for d in documents(4) for word in d.text.split()]
    assert max(len(p.text.split()) for p in found) <= tune.WORDS[1] and {p.title for p in found} == {
        f"file-{i}" for i in range(4)
    }
    with pytest.raises(TrainError, match="10 are the least to tune with"):
        tune.passages_of(documents(1, 100))


@pytest.mark.parametrize("files", [1, 3, 20])
def test_held_out_documents_are_never_trained_on(files, tmp_path):
    passages = tune.passages_of(documents(files, 1500 if files == 1 else 600))
    trained, held_out = tune.split(passages)
    assert len(held_out) >= tune.CONTEXT and not set(trained) & set(held_out)
    assert set(trained) | set(held_out) == set(passages)
    if files == 20:
        assert not {p.document for p in trained} & {p.document for p in held_out}
    asked = [{"passage": p.text, "question": "Who?", "answer": "it"} for p in passages]
    tune.prepare(passages, tmp_path, 30, asked)
    for split, side in (("train", trained), ("validation", held_out)):
        lines = [json.loads(line) for line in (tmp_path / "tune" / f"{split}.jsonl").read_text().splitlines()]
        texts = {document["text"] for line in lines for document in line["documents"]}
        assert texts <= {p.text for p in side}
        assert all(len(line["documents"]) <= tune.CONTEXT and line["questions"] for line in lines)
    assert len({p.text for p in trained} & texts) == 0


def test_a_question_is_kept_where_its_answer_depends_on_the_passage(llama, monkeypatch):
    """The model's likelihoods are its own; how much a passage must help decides."""
    passages = tune.passages_of(documents(4))[:3]
    with Engine.load(llama) as engine:
        asked = [(p, "Who dug the harbour?") for p in passages]
        monkeypatch.setattr(tune, "DEPENDS", -1e9)
        every = tune.answered(engine, asked)
        monkeypatch.setattr(tune, "DEPENDS", 1e9)
        assert tune.answered(engine, asked) == []
    assert [one["passage"] for one in every] == [p.text for p in passages if any(o["passage"] == p.text for o in every)]
    assert all(one["question"] == "Who dug the harbour?" and one["answer"] for one in every)


def test_given_questions_find_their_passages(tmp_path):
    passages = [
        tune.Excerpt("", f"about number {i} and the {word}", "d") for i, word in enumerate(("sea", "sky", "sun"))
    ]
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "What of the sky?"}\nWhere is the sun\n\n')
    assert tune.given(path, passages) == [(passages[1], "What of the sky?"), (passages[2], "Where is the sun")]
    path.write_text('{"answer": 1}\n')
    with pytest.raises(TrainError, match=r"q.jsonl:1 isn't a question"):
        tune.given(path, passages)


@pytest.mark.parametrize(("spec", "says"), [("full", "name another one"), ("kvlink", "link_start=3")])
def test_methods_that_can_not_be_tuned_are_refused(spec, says):
    with pytest.raises(TrainError, match=says):
        tune.configuration("m", [spec], ["all"], Path("d"), steps=1)


def adapter(folder: Path, weights: bytes, card: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("out", ["docs", "docs/adapter", "..", ".", "file", "merged", "others", "model"])
def test_a_folder_with_something_else_is_refused_before_anything_is_done(out, tmp_path, monkeypatch, capfd):
    """Whatever `out` names is replaced in the end, so it must be an adapter that `tune` made, or nothing."""
    (tmp_path / "home").mkdir()
    docs = folder(tmp_path / "home" / "docs", 2, 3000)
    adapter(tmp_path / "home" / "merged", b"new", MEASURED).joinpath("model.safetensors").write_bytes(b"whole")
    adapter(tmp_path / "home" / "others", b"other", "Trained by somebody else.")
    adapter(tmp_path / "home" / "model", b"base", MEASURED)
    (tmp_path / "home" / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path / "home")
    assert run("tune", "model", docs, "--out", out) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"kvgraph: {out} ") and "give a" in said


class Cut(BaseException):
    """What a kill is to a test."""


def test_an_earlier_adapter_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    def whole(weights: bytes) -> list[Path]:
        return [path for path in tmp_path.glob("*/*.safetensors") if path.read_bytes() == weights]

    made = adapter(tmp_path / "out.run" / "step-000001" / "adapter", b"new", "card")
    monkeypatch.setattr(tune, "train", lambda *_: TrainResult(1, made.parent, None))
    monkeypatch.setattr(tune, "measured", lambda *_, **__: [])
    config = tune.configuration("llama", ["block"], ["all"], tmp_path / "out.run" / "data", steps=1)
    out = adapter(tmp_path / "out", b"old", f"card\n{MEASURED}\n")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainError, match="somewhere: No space left on device; fix that"),
    ):
        patch.setattr(shutil, "copytree", full)
        tune.tune(config, out)
    assert (out / "adapter_model.safetensors").read_bytes() == b"old"
    rename = Path.rename
    for last in (0, 1):  # renames before the kill
        left = [None] * last

        def cut(path: Path, to: Path, left: list[None] = left) -> Path:
            if not left:
                raise Cut
            left.pop()
            return rename(path, to)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(Path, "rename", cut)
            tune.tune(config, out)
        assert len(whole(b"old")) == 1
    tune.tune(config, out)
    assert whole(b"new") == [out / "adapter_model.safetensors"] and not whole(b"old")
    assert MEASURED in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="holds something other"):
        tune.tune(config, out)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return int(end.value.code or 0)


def test_from_documents_to_an_adapter(llama, tmp_path, capfd):
    docs, out = folder(tmp_path / "docs"), tmp_path / "adapter"
    words = ("tune", llama, docs, "--out", out, "--method", "block", "--method", "graph-kv", "--edges", "top-k:2")
    assert run(*words, "--steps", 3, "--dry-run") == 0
    assert "10 documents" in capfd.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == ["docs"]
    assert run(*words, "--steps", 3, "--write", 2, "--rank", 4) == 0
    told = capfd.readouterr()
    assert "3 steps over" in told.err and "recitations, graph-kv (top-k:2)" in told.out
    found = models.load(out)  # the adapter names its base
    assert found.tuned_for == ("block", "graph-kv")
    assert found.fingerprint != models.load(llama).fingerprint
    card = (out / "README.md").read_text()
    assert "On held-out documents" in card and "recitations" in card
    records = Records(tmp_path / "adapter.run" / "data" / "tune", "validation", found.tokenizer, recite=tune.RECITE)
    lines = tune.measured(llama, out, records.path.parent, [("block", "none")], 4096)
    line = next(line for line in lines if (line.kind, line.method) == ("recitations", "block"))
    assert f"{line.after:7.3f}" in card
    hf = models.load(llama, adapter=out, dtype="float32").hf
    trainable = models.trainable(hf)

    def merged(packed):
        return logits(trainable, packed)

    with torch.no_grad():
        rows = list(gap.score(merged, {"m": torch.no_grad}, records, range(len(records)), [("block", "none")], 4096))
    nats = [row.nats for row in rows if (row.kind, row.method) == ("recitations", "block")]
    assert sum(nats) / len(nats) == pytest.approx(line.after, abs=2e-3)


def test_a_run_does_not_go_on_with_other_documents_or_questions(llama, tmp_path, capfd):
    docs, out, questions = folder(tmp_path / "docs"), tmp_path / "adapter", tmp_path / "questions.txt"
    questions.write_text("Where is the harbour?\n")
    words = ("tune", llama, docs, "--out", out, "--steps", 1, "--write", 2, "--rank", 4)
    assert run(*words) == 0
    capfd.readouterr()
    says = f"kvgraph: {out}.run has data of other documents, questions, steps or seed; give another --out, or delete"
    for more in (("--seed", 1), ("--write", 3), ("--steps", 2), ("--questions", questions)):
        assert run(*words, *more) == 1
        (said,) = capfd.readouterr().err.splitlines()
        assert said.startswith(says)
    assert run(*words) == 0  # the run is over, and the adapter is made of it again
    (docs / "file-0.txt").write_text(text(99, 300))
    capfd.readouterr()
    assert run(*words) == 1 and capfd.readouterr().err.startswith(says)
    (tmp_path / "adapter.run/data/tune/prepared.json").write_text('{"source": "tune", "finished": true}')
    assert run(*words) == 0  # data of older versions don't say what they are of
