"""Training runs: that stopping, packing and the number of processes change nothing, what checkpoints hold, and faults."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

from commands import Command
from kvgraph import ContextGraph, Engine, methods, models
from kvgraph.data.world import tokenizer
from kvgraph.errors import KVGraphError
from kvgraph.train import batches, checkpoint, model, optim, recipes, start, trainer
from kvgraph.train.config import Component, Config, Stage, TrainError
from kvgraph.train.example import Example
from kvgraph.train.export import export
from kvgraph.train.mixture import Drawn
from kvgraph.train.pack import lay
from kvgraph.train.trainer import Trainer, _Signals, train
from soak import SOAK, draws, some
from train_runs import CHUNKS, HOPS, LINKED, config, evaluations, rows, steps, write_model

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

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
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def unbroken(llama, tmp_path_factory) -> Path:
    """The run of eight steps that others are compared with."""
    out = tmp_path_factory.mktemp("unbroken")
    train(config(llama), out)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint of a run saved for users."""
    return models.load(checkpoint.found(run)[-1] / "model").hf.state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the same losses, whatever happens -------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "muon": {"optimizer": "muon", "matrix_lr": 0.01},
    "stack": {"stack": 1},
    "links": {"stages": (LINKED,), "trained": "links", "links": 2, "slots": 16},
    "lora": {"stages": (LINKED,), "trained": "lora", "links": 1, "slots": 16, "checkpointing": "full"},
    "tied": {"precision": "bfloat16", "schedule": "trapezoid"},
}


@pytest.mark.parametrize("kind", KINDS if SOAK else ["adamw", "lora"])
def test_a_resumed_run_is_the_unbroken_one(kind, llama, tmp_path):
    start_from = write_model(tmp_path / "model", tie_word_embeddings=True) if kind == "tied" else llama
    whole = config(start_from, **KINDS[kind])
    train(whole, tmp_path / "a")
    for limit in (2, 4, 0) if kind == "adamw" else (4, 0):
        train(replace(whole, limit=limit), tmp_path / "b")
    assert steps(tmp_path / "b") == steps(tmp_path / "a")
    assert evaluations(tmp_path / "a") == [row for row in evaluations(tmp_path / "b") if row["step"] != 2]
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


class Clock:
    """A clock for the trainer. It stands still but for ten minutes in each step, and begins anew in each process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, take = 0.0, Trainer._step

        def step(*args: Any) -> Any:
            self.now += 600
            return take(*args)

        monkeypatch.setattr(Trainer, "_step", step)
        monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=self.read, perf_counter=time.perf_counter))

    def read(self) -> float:
        return self.now


def test_the_time_of_a_run_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    """Ten minutes a step leave six of eight steps in an hour, with the rates of a clock, however often the run stops."""
    whole, clock = config(llama, minutes=60, evaluation=0, save_every=1), Clock(monkeypatch)
    assert train(whole, tmp_path / "unbroken").step == 6
    for limit in (2, 5):
        clock.now = 12345.0 * limit
        assert train(replace(whole, limit=limit), tmp_path / "run").step == limit
    shutil.copytree(tmp_path / "run", tmp_path / "older")
    clock.now = 0.0
    assert train(whole, tmp_path / "run").step == 6
    assert steps(tmp_path / "run") == steps(tmp_path / "unbroken")
    assert len({row["lr"] for row in steps(tmp_path / "run")}) == 6

    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    over = train(whole, tmp_path / "run")
    assert (over.step, over.checkpoint.name, over.signal) == (6, "step-000006", None)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert train(replace(whole, minutes=80), tmp_path / "run").step == 8  # two more steps are paid for

    progress = tmp_path / "older" / "step-000005" / "progress.json"  # as before there were seconds
    progress.write_text(json.dumps({k: v for k, v in json.loads(progress.read_text()).items() if k != "seconds"}))
    assert train(whole, tmp_path / "older").step == 8


def test_what_is_trained_learns(unbroken):
    losses = [row["loss"] for row in evaluations(unbroken) if row["component"] == "hops"]
    assert losses[-1] < losses[0] - 0.1 and steps(unbroken)[-1]["drawn"].keys() == {"hops", "chunks"}


def test_packing_changes_nothing(llama, unbroken, tmp_path):
    """One sequence a step or many give the same losses, evaluations and weights, up to rounding."""
    train(config(llama, length=2048), tmp_path)
    packed, loose = steps(tmp_path), steps(unbroken)
    assert {row["sequences"] for row in packed} == {1} and min(row["sequences"] for row in loose) > 1
    assert [row["drawn"] for row in packed] == [row["drawn"] for row in loose]
    assert [row["loss"] for row in packed] == pytest.approx([row["loss"] for row in loose], abs=1e-5)
    assert [row["gradient_norm"] for row in packed] == pytest.approx([r["gradient_norm"] for r in loose], rel=1e-4)
    assert [row["loss"] for row in evaluations(tmp_path)] == pytest.approx(
        [row["loss"] for row in evaluations(unbroken)], abs=1e-5
    )


def test_workers_send_no_tensors(llama, tmp_path, monkeypatch):
    """Each would take a shared file; a worker that found no room for one lost the chunk, and the trainer waited forever."""
    sent, packed = [], batches._packed

    def noted(drawn: list[batches.ShippedExample], *rest: Any) -> batches.Batch:
        sent.extend(drawn)
        return packed(drawn, *rest)

    monkeypatch.setattr(batches, "_packed", noted)
    train(config(llama, limit=2, workers=1, evaluation=0), tmp_path)
    values = [value for one in sent for value in one.laid.values()]
    assert any(isinstance(v, np.ndarray) for v in values) and not any(isinstance(v, torch.Tensor) for v in values)


def test_activation_checkpointing_changes_nothing(llama, tmp_path):
    found = []
    for which in ("none", "selective", "full"):
        built = model.build(config(llama, checkpointing=which))
        found.append([layer.gradient_checkpointing for layer in built.hf.model.layers])
        train(config(llama, checkpointing=which, limit=2), tmp_path / which)
    assert found == [[False, False], [True, False], [True, True]]
    assert steps(tmp_path / "none") == steps(tmp_path / "selective") == steps(tmp_path / "full")


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model_that_declares_its_methods(unbroken):
    folder = checkpoint.found(unbroken)[-1] / "model"
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert hf.config.kvgraph["tuned_for"] == ["block", "graph-kv", "kvlink"]
    engine = Engine(models.load(folder))  # a warning about tuning would be an error here
    graph = ContextGraph(["Ama serves Bo .", "Bo is in Cu ."], "Where ?").tokenized(
        lambda text: tuple(engine.model.tokenizer(text, add_special_tokens=False).input_ids)
    )
    assert engine.generate(graph, methods.parse(tokenizer.kvlink(4)), max_tokens=2)


def test_the_latest_checkpoints_are_kept(unbroken):
    assert [path.name for path in checkpoint.found(unbroken)] == ["step-000006", "step-000008"]
    assert not list(unbroken.glob(".step-*"))
    assert Config.read(unbroken / "config.json") == Config.read(unbroken / "step-000008" / "config.json")


def test_what_was_not_finished_is_not_a_checkpoint(llama, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "step-000008")
    (run / ".step-000008" / "model").mkdir(parents=True)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 8, "los')
    assert train(config(llama), run).step == 8
    assert rows_without_time(run) == rows_without_time(unbroken)


def rows_without_time(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run)]


def test_a_damaged_checkpoint_is_named(llama, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    data = run / "step-000008" / "state" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(TrainError, match="step-000008/state can't be read: .*delete"):
        train(config(llama, limit=9, stages=config(llama).stages), run)


def test_another_run_is_not_gone_on_with(llama, unbroken, tmp_path):
    with pytest.raises(TrainError, match=r"another run \(lr 0.001 there, 0.1 here\)"):
        train(config(llama, lr=0.1), unbroken)
    with pytest.raises(TrainError, match="holds a run already, step-000008"):
        train(config(llama), unbroken, resume=False)
    shutil.copytree(unbroken, tmp_path / "run")
    assert train(config(llama, keep=1, evaluate_every=3), tmp_path / "run").step == 8  # these may change


def test_curves_are_written(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(unbroken / "tensorboard"))
    board.Reload()
    assert {"loss", "lr", "gradient_norm", "tokens_per_second", "drawn/hops", "hops/full/exact"} <= set(
        board.Tags()["scalars"]
    )
    assert board.Scalars("hops/full/loss")[-1].value == pytest.approx(
        next(r["loss"] for r in evaluations(unbroken)[::-1] if r["method"] == "full")
    )


def test_an_evaluation_counts_tokens_and_whole_answers(llama, tmp_path):
    """Against plain forwards of one question each; some answers are what the model says itself."""
    trainer = Trainer(config(llama), tmp_path, True, False)
    plain = models.load(llama)
    graph = ContextGraph([[110, 111, 112], [113, 114]], prefix=[1])
    method = methods.parse("block")
    drawn, losses, exact = [], [], []
    for i, query in enumerate([[120, 121], [122], [123]]):
        said: list[int] = []
        while len(said) < 3:
            said.append(int(forward(plain, graph, method, query, [*said, 0])[len(said)].argmax()))
        for answer in [said, said[:2]] if i else [said, [said[0], 5, said[2]]]:
            found = forward(plain, graph, method, query, answer)
            losses.append(torch.nn.functional.cross_entropy(found, torch.tensor(answer), reduction="none"))
            exact.append(bool((found.argmax(-1) == torch.tensor(answer)).all()))
            example = Example(graph, [(query, answer)])
            drawn.append(Drawn("c", example, method, lay(example, method)))
    row = trainer._taken(batches._validation_set("c", "block", drawn, 20))
    trainer.log.close()
    assert row["answers"] == 6 and row["exact"] == pytest.approx(sum(exact) / 6) and 0 < sum(exact) < 6
    assert row["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def forward(plain: models.Model, graph: ContextGraph, method: Any, query: list[int], answer: list[int]) -> torch.Tensor:
    """The logits of an answer's tokens by transformers' own attention."""
    d = method.plan(graph.with_query((*query, *answer[:-1]))).dense()
    out = plain.dense(torch.from_numpy(d.tokens), torch.from_numpy(d.positions), torch.from_numpy(d.visible))
    return out[-len(answer) :]


# -- settings --------------------------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls():
    base = config("m", warmup=0.2, decay=0.5)
    cosine = [optim.share(base, step, 10) for step in range(1, 11)]
    assert (
        cosine[:3] == [0.5, 1.0, 1.0]
        and cosine[6] == pytest.approx(0.5)
        and cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)
    )
    trapezoid = [optim.share(replace(base, schedule="trapezoid"), step, 10) for step in range(1, 11)]
    assert trapezoid == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert {optim.share(replace(base, schedule="constant", warmup=0.0), step, 10) for step in range(1, 11)} == {1.0}


def test_norms_biases_embeddings_and_fixed_parts_have_no_decay(tmp_path):
    folder = write_model(tmp_path, "Qwen2")
    settings = config(folder, weight_decay=0.5, optimizer="muon", matrix_lr=0.1)
    built = model.build(settings)
    layers = built.hf.model.layers
    fixed = layers[0].self_attn.q_proj.weight
    muon, adamw = optim.optimizers(settings, built.module, built.embeddings, [fixed])
    decays = {p: group["weight_decay"] for o in (muon, adamw) for group in o.param_groups for p in group["params"]}
    assert len(decays) == len(list(built.module.parameters()))
    named = dict(built.module.named_parameters())
    decayed = {name for name, p in named.items() if decays[p]}
    assert decayed == {n for n, p in named.items() if "_proj.weight" in n and p is not fixed}
    assert {p for group in muon.param_groups for p in group["params"]} == {
        p for n, p in named.items() if "_proj.w" in n
    }
    assert {group["lr"] for group in muon.param_groups} == {0.1} and adamw.param_groups[0]["lr"] == settings.lr


@pytest.mark.parametrize("optimizer", some(["muon", "adamw"], 1))
def test_the_new_model_keeps_what_it_starts_with(optimizer, tmp_path):
    """Also when a second run goes on from what the first one saved, with copies of its layers on top."""
    hops = (Stage((HOPS,), steps=2),)
    settings = config("world", optimizer=optimizer, matrix_lr=0.01, weight_decay=0.3, stages=hops, evaluation=0)
    start.write(tmp_path / "start", settings.seed)
    before = models.load(tmp_path / "start").hf
    train(settings, tmp_path / "a")
    train(replace(settings, model=str(tmp_path / "a" / "step-000002" / "model"), stack=start.LAYERS), tmp_path / "b")
    after = models.load(tmp_path / "b" / "step-000002" / "model").hf
    for (old, part), (new, _) in zip([*start.frozen(before)] * 2, start.frozen(after), strict=True):
        assert torch.equal(old[part], new[part])
    first, lowest, copied = (
        m.model.layers[i].self_attn.v_proj.weight for m, i in ((before, 0), (after, 0), (after, 3))
    )
    assert not torch.equal(first, lowest) and not torch.equal(lowest, copied)


def test_asking_through_links_needs_links(llama, tmp_path):
    component = replace(HOPS, methods=("kvlink:links=0",), through_links=True)
    with pytest.raises(TrainError, match="component hops asks through link tokens, but kvlink:links=0 has none"):
        train(config(llama, stages=(Stage((component,), steps=1),)), tmp_path / "run")


def test_epochs_are_counted_over_what_has_an_end(llama, tmp_path):
    folder = prepared(tmp_path / "few", 10)
    both = (Component("few", "few", ("full",), 1.0), replace(HOPS, weight=3.0))
    settings = config(llama, data=str(tmp_path), stages=(Stage(both, epochs=2.0),), evaluation=0)
    assert [p.steps for p in batches.plan(settings, settings.stages, models.load_tokenizer(llama))] == [5]
    endless = (Stage((HOPS,), epochs=1.0),)
    with pytest.raises(TrainError, match="none of its components has an end"):
        batches.plan(settings, endless, models.load_tokenizer(llama))
    only = replace(settings, stages=(Stage(both[:1], epochs=2.0),), evaluation=2, evaluate_every=1000)
    train(only, tmp_path / "run")
    assert steps(tmp_path / "run")[-1]["drawn"] == {"few": 20} and evaluations(tmp_path / "run")[0]["answers"] == 2
    assert folder.is_dir()


def prepared(folder: Path, count: int) -> Path:
    """A folder of training records, as `kvgraph data prepare` leaves them."""
    folder.mkdir()
    for split in ("train", "validation"):
        lines = [
            {"id": str(i), "text": "She serves Brepu . The firm is in that city . " * (1 + i)} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prepared.json").write_text('{"finished": true}')
    return folder


def test_examples_that_do_not_fit_are_counted_and_told(llama, tmp_path, capsys):
    large = replace(HOPS, source="world:hops,questions=3,entities=2-6")
    train(config(llama, stages=(Stage((large,), steps=3),), length=200, evaluation=0), tmp_path)
    missing = steps(tmp_path)[-1]["left_out"]["hops"]
    assert missing > 0 and f"{missing} examples didn't fit 200 tokens" in capsys.readouterr().err


def test_new_links_get_ids_of_their_own(llama, tmp_path):
    settings = config(llama, stages=(LINKED,), links=2, slots=16, trained="links", lr=0.1, evaluation=0)
    train(settings, tmp_path)
    old, new = models.load(llama).hf, models.load(checkpoint.found(tmp_path)[-1] / "model").hf
    count = len(tokenizer.vocabulary())
    spec = f"kvlink:links=2,link_start={count},slots=16,mem_start={count + 32},mem_end={count + 33}"
    assert new.config.kvgraph["methods"] == ["block", spec] and methods.parse(spec)
    rows_before, rows_after = old.get_input_embeddings().weight, new.get_input_embeddings().weight
    assert torch.equal(rows_before, rows_after[:count]) and rows_after.shape[0] == count + 34
    assert torch.equal(old.model.layers[0].mlp.up_proj.weight, new.model.layers[0].mlp.up_proj.weight)
    drawn = model.build(settings).hf.get_input_embeddings().weight
    assert not torch.equal(drawn[count + 32], rows_after[count + 32])


def test_reserved_links_are_trained_alone(llama, tmp_path):
    train(config(llama, trained="links", stages=(Stage((CHUNKS,), steps=2),), lr=0.1, evaluation=0), tmp_path)
    old, new = models.load(llama).hf, models.load(checkpoint.found(tmp_path)[-1] / "model").hf
    changed = {
        name for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == {"model.embed_tokens.weight"}
    moved = (old.get_input_embeddings().weight != new.get_input_embeddings().weight).any(1).nonzero().flatten().tolist()
    assert moved and set(moved) <= {4, 5, *range(6, 102)}  # memory and link tokens of the world's tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 4}, "no component has it"),
        (
            {"trained": "links", "stages": (Stage((HOPS,), steps=1),)},
            "no component has a method with tokens of its own",
        ),
        ({"lr": 1e30, "clip": 0.0, "warmup": 0.0}, r"the loss of step \d+ is .*lower lr"),
        ({"stages": (Stage((Component("few", "few", ("full",)),), steps=1),)}, "few"),
        ({"model": "/nowhere"}, "there is no folder /nowhere"),
    ],
)
def test_what_can_not_be_trained_is_told(changes, message, llama, tmp_path):
    with pytest.raises(KVGraphError, match=message) as error:
        train(replace(config(llama, evaluation=0, data=str(tmp_path)), **changes), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_examples_that_never_fit_end_the_run(llama, tmp_path):
    prepared(tmp_path / "few", 10)
    stages = (Stage((Component("few", "few", ("graph-kv",)),), steps=1),)
    with pytest.raises(TrainError, match="no example of 1,000 fits 1 tokens"):
        train(config(llama, stages=stages, data=str(tmp_path), length=1), tmp_path / "run")


# -- killed, stopped, without memory or disk -------------------------------------------------------------------------


def started(settings: Config, out: Path, memory: int = 0, file_size: int = 0, **environment: str) -> Command:
    """`kvgraph train` in a process; see train_worker.py for its limits."""
    file = out.with_suffix(".json")
    file.write_text(settings.to_json())
    words = ("train", "--config", file, "--out", out)
    return Command(memory, file_size, *words, module="train_worker", **environment)


def wait_for_step(process: Command, out: Path, step: int) -> None:
    """Until the log has this step, or a later one."""
    end = time.monotonic() + 60
    log = out / "log.jsonl"
    while not any(line.startswith(tuple(f'{{"step": {n},' for n in range(step, step + 9))) for line in _lines(log)):
        assert time.monotonic() < end, process.stderr
        time.sleep(0.01)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_killed_run_goes_on_as_if_it_had_not_been(llama, tmp_path):
    """SIGKILL at any time, even while a checkpoint is written: same losses, same data, same evaluations."""
    last = draws(10, 20)  # step
    long = config(llama, stages=(Stage((HOPS,), steps=6), Stage((HOPS, CHUNKS), steps=last - 6)), save_every=2)
    train(long, tmp_path / "unbroken")
    for seed in range(15 if SOAK else 1):
        rng, out = random.Random(seed), tmp_path / str(seed)
        for step in sorted(rng.sample(range(1, last - 1), 2)):
            process = started(long, out)
            wait_for_step(process, out, step)
            time.sleep(rng.random() / 10)
            process.kill()
            process.wait()
        assert started(long, out).wait() == 0
        assert rows_without_time(out) == rows_without_time(tmp_path / "unbroken")
        assert len(checkpoint.found(out)) == long.keep and not list(out.glob(".step*"))


def test_an_evaluation_that_a_kill_cut_off_is_made_after_all(llama, unbroken, tmp_path):
    train(config(llama, limit=4), tmp_path)
    kept = [row for row in rows(tmp_path) if "component" not in row]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    train(config(llama), tmp_path)
    assert rows_without_time(tmp_path) == rows_without_time(unbroken)


@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], 1))
def test_a_stopped_run_saves_and_says_how_to_go_on(number, llama, tmp_path):
    long = config(llama, stages=(Stage((HOPS,), steps=20),), evaluation=0, save_every=1000)
    train(long, tmp_path / "unbroken")
    out = tmp_path / "run"
    process = started(long, out)
    wait_for_step(process, out, 4)
    process.send_signal(number)
    assert process.wait() == 128 + number
    (saved,) = checkpoint.found(out)
    step = int(saved.name.removeprefix("step-"))
    said = process.stderr.splitlines()
    assert f"stopped by {number.name} after step {step}; resume with: kvgraph train --resume {out}" in said
    assert 4 <= step < 20
    train(long, out)
    assert steps(out) == steps(tmp_path / "unbroken")


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), _Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_without_memory_a_run_ends_with_what_to_lower(llama, tmp_path):
    wide = write_model(tmp_path / "wide", intermediate_size=8192)
    first, out = config(wide, limit=1, batch=8, length=2048, evaluation=0), tmp_path / "run"
    train(first, out)
    process = started(replace(first, limit=2), out, memory=400 << 20)
    assert process.wait() == 1
    said = process.stderr.splitlines()[-1]
    assert re.match(r"kvgraph: out of memory; lower length \(2,048\), use checkpointing=full", said)
    saved = checkpoint.found(out)[-1]
    assert f"{saved} is complete" in said
    train(replace(first, limit=2), out)
    train(replace(first, limit=2), tmp_path / "unbroken")
    assert steps(out) == steps(tmp_path / "unbroken")


def test_with_a_full_disk_the_last_checkpoint_stays(llama, unbroken, tmp_path):
    out = tmp_path / "run"
    train(config(llama, limit=3), out)
    process = started(config(llama), out, file_size=50_000)
    assert process.wait() == 1
    said = process.stderr.splitlines()[-1]
    assert said.startswith(f"kvgraph: {out} can't be written: File too large; free some space"), said
    assert f"{out}/step-000003 is complete" in said and [p.name for p in checkpoint.found(out)] == ["step-000003"]
    models.load(out / "step-000003" / "model")
    train(config(llama), out)
    assert steps(out) == steps(unbroken)


# -- several processes -----------------------------------------------------------------------------------------------


def together(settings: Config, out: Path, count: int = 2) -> None:
    """Run a configuration in processes that meet over gloo, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = [started(settings, out, **shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(count)]
    assert [process.wait() for process in processes] == [0] * count, "".join(p.stderr for p in processes)


def assert_close(run: Path, other: Path) -> None:
    found, expected = steps(run), steps(other)
    assert [row["drawn"] for row in found] == [row["drawn"] for row in expected]
    for name, rel in (("loss", 1e-5), ("gradient_norm", 1e-3)):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-5, rel=rel)
    for row, want in zip(evaluations(run), evaluations(other), strict=True):
        assert row == pytest.approx(want, abs=1e-5)


def by_torchrun(settings: Config, out: Path) -> None:
    """The same, as one would type it."""
    file = out.with_suffix(".json")
    file.write_text(settings.to_json())
    words = ["--nproc-per-node", 2, "-m", "kvgraph.cli", "train", "--config", file, "--out", out]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"trained 8 steps; the model is in {out}/step-000008/model\n"


@pytest.mark.parametrize(
    "torchrun", [False, pytest.param(True, marks=pytest.mark.slow)]
)  # it imports all in each process
def test_two_processes_are_one(llama, unbroken, tmp_path, torchrun):
    """Each step has several sequences, some steps more for one process than for the other; what they save is one model."""
    out = tmp_path / "run"
    if torchrun:
        by_torchrun(config(llama), out)
    else:
        together(config(llama), out)
    assert {row["sequences"] % 2 for row in steps(unbroken)} == {0, 1}
    assert_close(out, unbroken)
    alone, shared = weights(unbroken), weights(out)
    assert all(torch.allclose(alone[name], shared[name], atol=1e-4) for name in alone)
    export(out, tmp_path / "exported", dtype="bfloat16")
    assert models.load(tmp_path / "exported").dtype == torch.bfloat16


@pytest.mark.parametrize(("first", "then"), some([(together, train), (train, together)], 1))
def test_a_run_goes_on_with_another_number_of_processes(first, then, llama, unbroken, tmp_path):
    first(config(llama, limit=4), tmp_path)
    then(config(llama), tmp_path)
    assert_close(tmp_path, unbroken)


@pytest.mark.parametrize("kind", [k for k in KINDS if k == "lora" or (SOAK and k != "muon")])
def test_adapters_and_the_rest_are_sharded_too(kind, llama, tmp_path):
    settings = config(llama, limit=draws(2, 4), **KINDS[kind] | {"precision": "float32"})
    train(settings, tmp_path / "one")
    together(settings, tmp_path / "two")
    assert_close(tmp_path / "two", tmp_path / "one")


def test_muon_is_for_one_process(llama, tmp_path):
    with pytest.raises(AssertionError, match="muon needs whole matrices, which several processes share out"):
        together(config(llama, **KINDS["muon"]), tmp_path / "two")


# -- export ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_as_it_is_or_in_another_dtype(unbroken, tmp_path):
    export(unbroken, tmp_path / "latest")
    export(unbroken / "step-000006" / "state", tmp_path / "half", dtype="bfloat16")
    assert_equal(models.load(tmp_path / "latest").hf.state_dict(), weights(unbroken))
    earlier = models.load(unbroken / "step-000006" / "model").hf.state_dict()
    half = models.load(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and half.tuned_for == ("block", "graph-kv", "kvlink")
    assert_equal(half.hf.state_dict(), {name: tensor.bfloat16() for name, tensor in earlier.items()})
    with pytest.raises(TrainError, match="is there already"):
        export(unbroken, tmp_path / "half")
    with pytest.raises(TrainError, match="neither a run's folder"):
        export(tmp_path, tmp_path / "none")


def test_an_adapter_is_exported_merged(llama, tmp_path):
    train(config(llama, limit=2, **KINDS["lora"]), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "whole", dtype="float32")
    assert_equal(models.load(tmp_path / "whole").hf.state_dict(), weights(tmp_path / "run"))
    assert not torch.equal(
        weights(tmp_path / "run")["model.layers.0.mlp.up_proj.weight"],
        models.load(llama).hf.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )


def torchtune(name: str) -> str:
    """Facts from torchtune's convert_weights: its names of a Llama's parameters."""
    for part, other in (
        ("model.embed_tokens", "tok_embeddings"), ("model.layers", "layers"), ("model.norm.weight", "norm.scale"),
        ("lm_head", "output"), ("self_attn.o_proj", "attn.output_proj"), ("self_attn", "attn"),
        ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
        ("input_layernorm.weight", "sa_norm.scale"), ("post_attention_layernorm.weight", "mlp_norm.scale"),
    ):  # fmt: skip
        name = name.replace(part, other)
    return name


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of rotations that turn neighbouring rows."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(weight.shape)


@pytest.mark.parametrize("naming", ["hf", "torchtune"])
def test_other_trainers_checkpoints_are_exported(naming, llama, tmp_path):
    """As KVLink's code writes them: the model below "model.", and an optimizer that nobody needs."""
    trained = models.load(write_model(tmp_path / "trained", initializer_range=0.03)).hf.state_dict()
    written = {}
    for name, weight in trained.items():
        if naming == "torchtune" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = neighbours(weight, 4 if "q_proj" in name else 2)
        written[torchtune(name) if naming == "torchtune" else name] = weight
    dcp.save({"model": written, "optimizer": {"steps": torch.tensor(3)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    export(tmp_path / "dcp", tmp_path / "out", base=llama)
    assert_equal(models.load(tmp_path / "out").hf.state_dict(), trained)
    assert models.load(tmp_path / "out").tokenizer is not None
    with pytest.raises(TrainError, match="give the model it was trained from with --base"):
        export(tmp_path / "dcp", tmp_path / "other")


def test_an_incomplete_export_is_refused(llama, tmp_path):
    state = dict(models.load(llama).hf.state_dict())
    short = {name: tensor for name, tensor in state.items() if "layers.1.mlp.up" not in name}
    dcp.save(short, checkpoint_id=tmp_path / "short", no_dist=True)
    with pytest.raises(TrainError, match=r"lacks 1 of \d+ weights, for example model.layers.1.mlp.up_proj.weight"):
        export(tmp_path / "short", tmp_path / "out", base=llama)
    state["model.norm.weight"] = torch.ones(3)
    dcp.save(state, checkpoint_id=tmp_path / "odd", no_dist=True)
    with pytest.raises(TrainError, match=r"model.norm.weight in .* has the shape \[3\], but .* \[64\]"):
        export(tmp_path / "odd", tmp_path / "out", base=llama)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# -- the command -----------------------------------------------------------------------------------------------------


def test_recipes_are_listed_and_shown(run):
    code, out, _ = run("train", "--list")
    assert code == 0 and len(out.splitlines()) == 2 + len(recipes.RECIPES)
    code, out, _ = run(
        "train", "--recipe", "kvlink-5", "--lr", "1e-5", "--betas", "0.8", "0.9", "--weights", "text=2,xsum=0", "--show"
    )
    shown, recipe = Config.from_json(out), recipes.get("kvlink-5")
    assert (shown.lr, shown.betas, shown.batch) == (1e-5, (0.8, 0.9), recipe.batch)
    before = {c.name: c.weight for c in recipe.stages[0].components}
    assert {c.name: c.weight for c in shown.stages[0].components} == {
        name: 2.0 if name == "text" else weight for name, weight in before.items() if name != "xsum"
    }
    _, out, _ = run("train", "--recipe", "world-mixed", "--method", "full", "--method", "kvlink:links=0", "--show")
    assert Config.from_json(out).stages[0].components[0].methods == ("full", "kvlink:links=0")


def test_every_recipe_is_read_again_and_older_names_too():
    for make in recipes.RECIPES.values():
        assert Config.from_json(make().to_json()) == make()
    older = recipes.get("world-2hop").to_json().replace('"stack": 3', '"deepen": 3')
    assert '"deepen"' in older and Config.from_json(older) == recipes.get("world-2hop")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": "fast"}, "lr: Input should be a valid number"),
        ({"speed": 1}, "speed: Unexpected keyword argument"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; there are adamw, muon"),
        (
            {"stages": [{"steps": 1, "components": [{"name": "a", "source": "b"}]}]},
            "stages.0.components.0.methods: Field",
        ),
        ({"betas": [0.9]}, "betas.1: Field required"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_line_that_names_the_setting(change, says):
    given = json.loads(recipes.get("kvlink-5").to_json()) | change
    with pytest.raises(TrainError) as error:
        Config.from_json(json.dumps(given))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_command_trains_goes_on_and_exports(run, llama, tmp_path):
    (tmp_path / "run.json").write_text(config(llama, evaluation=0).to_json())
    out = tmp_path / "run"
    code, said, told = run("train", "--config", tmp_path / "run.json", "--out", out, "--limit", 2)
    assert code == 0 and said == f"trained 2 steps; the model is in {out}/step-000002/model\n"
    assert '"limit": 2' in told and Config.read(out / "config.json").limit == 2
    assert run("train", "--resume", out, "--limit", 4)[:2] == (
        0,
        f"trained 4 steps; the model is in {out}/step-000004/model\n",
    )
    assert run("train", "export", out, tmp_path / "model")[0] == 0 and models.load(tmp_path / "model").tuned_for


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "nothing", "--out", "x"], "there is no recipe 'nothing'; there are kvlink-0"),
        (["--recipe", "world-1hop"], "give the run's folder"),
        (["--out", "x"], "give one of --recipe, --config and --resume"),
        (["--resume", "/nowhere"], "/nowhere isn't the folder of a run"),
        (["--recipe", "world-1hop", "--optimizer", "sgd", "--out", "x"], "optimizer is 'sgd'; there are adamw, muon"),
        (["--recipe", "world-1hop", "--weights", "1-hop=many", "--out", "x"], "'1-hop=many' isn't NAME=WEIGHT"),
        (["--recipe", "world-1hop", "--weights", "qa=1", "--out", "x"], "there is no component 'qa'; there are 1-hop"),
        (["--recipe", "world-1hop", "--weights", "1-hop=0", "--out", "x"], "components of a stage"),
        (["--config", __file__, "--out", "x"], "this isn't the configuration of a training run"),
        (["--recipe", "kvlink-5", "--data", "/nowhere", "--model", "/nowhere", "--out", "x"], "there is no folder"),
    ],
)
def test_mistakes_are_one_line(words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, told = run("train", *words)
    assert code in (1, 2) and message in told and "Traceback" not in told
    assert len(told.splitlines()[-1]) < 400
