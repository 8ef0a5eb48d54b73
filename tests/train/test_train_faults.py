"""What can go wrong with a run's data, settings, base and folder: one clear line, at the start, with nothing lost."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from kvgraph import ModelError, models
from kvgraph.data.io import locked
from kvgraph.engine.result import Result, Usage
from kvgraph.train import checkpoint, recipes
from kvgraph.train.config import Component, Config, Stage, TrainError
from kvgraph.train.export import export
from kvgraph.train.mixture import open_source, validation
from kvgraph.train.trainer import train
from train_runs import HOPS, config, evaluations, rows, steps, write_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*multi-threaded, use of fork",
        ".*is deprecated and will be removed",
        ".*torch.distributed is disabled",
    )
]


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def prepared(folder: Path, train_words: list[int], held_out: list[int]) -> Path:
    """Texts of so many words."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in (("train", train_words), ("validation", held_out)):
        lines = [json.dumps({"id": f"{split}{i}", "text": "the guild " * (n // 2)}) for i, n in enumerate(sizes)]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "prepared.json").write_text('{"finished": true}')
    return folder


def on_data(model: str, data: Path, methods: tuple[str, ...] = ("full",), **changes: Any) -> Config:
    stage = Stage((Component("texts", "texts", methods),), steps=3)
    return config(model, **{"stages": (stage,), "data": str(data), "save_every": 1, "evaluate_every": 2} | changes)


# -- 1: evaluation ---------------------------------------------------------------------------------------------------


def test_a_held_out_set_of_which_nothing_fits_is_left_out_and_said(llama, tmp_path, capfd):
    """Conversations are never cut, so long ones don't fit."""
    folder = prepared(tmp_path / "texts", [20] * 5, [])
    long = {
        "id": "x",
        "task": "nq",
        "question": "Who?",
        "answer": "it",
        "documents": [{"title": "", "text": "the " * 900}],
    }
    (folder / "validation.jsonl").write_text(json.dumps(long) + "\n")
    train(on_data(llama, tmp_path), tmp_path / "run")
    assert "no validation example of texts fits full, so it isn't evaluated" in capfd.readouterr().err
    assert not evaluations(tmp_path / "run") and len(checkpoint.found(tmp_path / "run")) == 2


def test_evaluation_comes_after_saving_and_scores_an_example_once(llama, tmp_path, monkeypatch):
    prepared(tmp_path / "texts", [20] * 5, [10, 12])
    source = open_source(
        Component("texts", "texts", ("full",)), str(tmp_path), models.load_tokenizer(llama), 0, "validation", 256
    )
    sizes = {"length": 256, "limit": 4096}
    (found,) = validation([Component("texts", "texts", ("full",))], [source], 0, 64, **sizes)
    assert len(found) == 2

    def broken(*args: Any) -> None:
        raise RuntimeError("no evaluation")

    monkeypatch.setattr("kvgraph.train.trainer.Trainer._taken", broken)
    with pytest.raises(RuntimeError, match="no evaluation"):
        train(on_data(llama, tmp_path), tmp_path / "run")
    assert [path.name for path in checkpoint.found(tmp_path / "run")] == ["step-000001", "step-000002"]


# -- 2: the base -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(llama, tmp_path) -> tuple[Path, Path, Config]:
    """(the base, a run of two steps that trains an adapter for it, its configuration)."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    whole = config(str(base), stages=(Stage((HOPS,), steps=4),), trained="lora", lora_rank=2, evaluation=0)
    train(replace(whole, limit=2), tmp_path / "run")
    return base, tmp_path / "run", whole


def test_a_run_refuses_a_base_with_other_weights(adapted, tmp_path):
    base, run, whole = adapted
    write_model(tmp_path / "other", tie_word_embeddings=True, initializer_range=0.1)
    shutil.copy(tmp_path / "other" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(TrainError, match="other weights than the one given"):
        train(whole, run)
    with pytest.raises(TrainError, match="other weights than the one given"):
        export(run, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_a_base_that_moved(adapted, tmp_path):
    base, run, whole = adapted
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="there is no folder"):
        train(whole, run)
    train(replace(whole, model=str(tmp_path / "moved")), run)
    assert len(steps(run)) == 4
    export(run, tmp_path / "out", dtype="float32", base=str(tmp_path / "moved"))
    assert models.load(tmp_path / "out").dtype == torch.float32


# -- 3: heads --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_head_of_its_own_keeps_it(llama, tmp_path):
    hf = models.load(llama).hf
    weights = {name: p.detach().clone() for name, p in hf.named_parameters()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).clone()
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "own", no_dist=True)
    export(tmp_path / "own", tmp_path / "out", base=llama)
    found = models.load(tmp_path / "out").hf
    assert not found.config.tie_word_embeddings
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        hidden = hf.model(tokens).last_hidden_state
        torch.testing.assert_close(found(tokens).logits, hidden @ weights["lm_head.weight"].T, atol=1e-4, rtol=1e-4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "same", no_dist=True)
    export(tmp_path / "same", tmp_path / "tied", base=llama)
    assert models.load(tmp_path / "tied").hf.config.tie_word_embeddings
    dcp.save(
        {"model": weights | {"model.layers.0.extra.weight": torch.ones(2)}},
        checkpoint_id=tmp_path / "more",
        no_dist=True,
    )
    with pytest.raises(TrainError, match="no place for, for example model.model.layers.0.extra.weight"):
        export(tmp_path / "more", tmp_path / "none", base=llama)


# -- 4 to 8 ----------------------------------------------------------------------------------------------------------


def test_two_trainers_do_not_share_a_folder(llama, tmp_path):
    with locked(tmp_path / "run", TrainError), pytest.raises(TrainError, match="is being written by another process"):
        train(config(llama), tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_files_of_something_else_are_not_replaced(name, llama, tmp_path):
    """A model's config.json is: a run in its folder would make it useless."""
    content = (Path(llama) / "config.json").read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match="holds a config.json or log.jsonl of something else; give another folder"):
        train(config(llama), tmp_path)
    assert (tmp_path / name).read_bytes() == content


def test_texts_are_cut_to_the_models_positions(tmp_path):
    small = write_model(tmp_path / "small", max_position_embeddings=64)
    prepared(tmp_path / "texts", [400] * 4, [400])
    train(on_data(small, tmp_path, length=256), tmp_path / "run")
    assert len(steps(tmp_path / "run")) == 3 and not any(rows(tmp_path / "run")[0]["left_out"].values())
    lines = [
        json.dumps(
            {
                "id": "q",
                "task": "nq",
                "question": "Who?",
                "answer": "it",
                "documents": [{"title": "", "text": "the " * 90}],
            }
        )
    ]
    (tmp_path / "texts" / "train.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(TrainError, match="fits the model's 64 positions; prepare shorter ones"):
        train(on_data(small, tmp_path, length=256), tmp_path / "long")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("kvlink:links=1,link_start=100000,slots=4", r"token id 100,003, but the model's vocabulary has"),
        ("ape", "component hops trains by ape, which no attention mask can express"),
        ("cacheblend", "component hops trains by cacheblend, which no attention mask can express"),
    ],
)
def test_methods_that_can_not_be_trained_are_refused_at_the_start(method, says, llama, tmp_path):
    stage = Stage((Component("hops", HOPS.source, ("full", method)),), steps=2)
    with pytest.raises(TrainError, match=says):
        train(config(llama, stages=(stage,)), tmp_path / "run")


def test_data_that_grew_under_a_run_are_refused(llama, tmp_path):
    prepared(tmp_path / "texts", [20] * 5, [10])
    whole = on_data(llama, tmp_path, evaluation=0)
    train(replace(whole, limit=1), tmp_path / "run")
    prepared(tmp_path / "texts", [20] * 9, [10])
    with pytest.raises(TrainError, match="texts had 5 examples when the run began, and has 9 now"):
        train(whole, tmp_path / "run")


def test_as_many_other_data_under_a_run_are_refused(llama, tmp_path):
    prepared(tmp_path / "texts", [20] * 5, [10])
    whole = on_data(llama, tmp_path, evaluation=0, keep=1)
    train(replace(whole, limit=1), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "older")
    prepared(tmp_path / "texts", [20, 20, 24, 20, 20], [10])
    with pytest.raises(TrainError, match="texts has other examples than when the run began, as many as then; put"):
        train(whole, tmp_path / "run")
    prepared(tmp_path / "texts", [20] * 5, [12])  # what only evaluations read may change
    shutil.move(tmp_path / "texts", tmp_path / "moved" / "texts")
    assert train(replace(whole, data=str(tmp_path / "moved")), tmp_path / "run").step == 3
    (origin,) = (tmp_path / "older").glob("*/origin.json")
    without = {name: value for name, value in json.loads(origin.read_text()).items() if name != "hashes"}
    origin.write_text(json.dumps(without))
    prepared(tmp_path / "texts", [20, 20, 24, 20, 20], [10])
    assert train(whole, tmp_path / "older").step == 3  # as before there were hashes


# -- 9: settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": None}, "batch: .*valid integer"),
        ({"batch": 2.5}, "batch: .*valid integer"),
        ({"lr": "fast"}, "lr: .*valid number"),
        ({"betas": [0.9]}, "betas.1: Field required"),
        ({"stages": {"steps": 3}}, "stages: .*valid tuple"),
        (
            {"stages": [{"steps": 3, "components": [{"name": "c", "source": "s", "methods": "block"}]}]},
            "stages.0.components.0.methods: .*valid tuple",
        ),
    ],
)
def test_a_configuration_of_other_types_is_one_clear_line(change, says):
    text = json.dumps(json.loads(config("m").to_json()) | change)
    with pytest.raises(TrainError, match=f"^this isn't the configuration of a training run: {says}"):
        Config.from_json(text)


def test_a_whole_number_may_have_a_point():
    text = json.dumps(json.loads(config("m").to_json()) | {"batch": 4.0, "lr": 1})
    found = Config.from_json(text)
    assert found.batch == 4 and isinstance(found.batch, int) and isinstance(found.lr, float)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_rate_that_is_no_number_is_refused(value):
    with pytest.raises(TrainError, match="lr is (inf|nan); it must be a finite number"):
        config("m", lr=value)


def test_weights_that_are_not_finite_are_never_saved(llama, tmp_path):
    """The loss and the gradient of the last step were still finite; its update wasn't."""
    one = Stage((HOPS,), steps=1)
    with pytest.raises(TrainError, match="isn't finite any more; lower lr"):
        train(config(llama, stages=(one,), lr=3e38, warmup=0.0, schedule="constant", evaluation=0), tmp_path)
    assert not checkpoint.found(tmp_path)


def test_a_truncated_progress_is_one_clear_line(llama, tmp_path):
    whole = config(llama, evaluation=0)
    train(replace(whole, limit=3), tmp_path)
    (checkpoint.found(tmp_path)[-1] / "progress.json").write_text('{"step": 3, "dra')
    with pytest.raises(
        TrainError, match=r"progress.json can't be read: .*; delete .*step-000003 to go on from the one before"
    ):
        train(whole, tmp_path)


def test_a_recipe_that_goes_on_from_another_model_asks_for_it(tmp_path):
    with pytest.raises(TrainError, match="world-2hop starts from another model; give it with --model"):
        train(recipes.get("world-2hop"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_can_be_compared():
    made = [Result("a", [1], "stop", Usage(), scores=torch.ones(2), first_logits=torch.ones(3)) for _ in range(2)]
    assert made[0] == made[1] and made[0] != replace(made[1], text="b")
