"""Tuning without labels: the objective against plain forwards, runs that resume, and adapters as PEFT writes them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div

import families
from kvgraph import ContextGraph, methods, models
from kvgraph.edges import all_pairs
from kvgraph.methods import Method
from kvgraph.train import batches, checkpoint, distill, gap
from kvgraph.train.config import Component, Config, Stage, TrainError
from kvgraph.train.example import Example
from kvgraph.train.forward import logits
from kvgraph.train.mixture import Drawn, Mixture, with_edges
from kvgraph.train.model import STUDENT
from kvgraph.train.pack import Packed, lay
from kvgraph.train.records import Records, example, recitation
from kvgraph.train.trainer import Trainer, train
from soak import SOAK
from train_runs import config, steps, write_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*multi-threaded, use of fork",
        ".*is deprecated and will be removed",
        ".*torch.distributed is disabled",
    )
]

SEGMENTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
PREFIX = [3, 4]
QUESTIONS = [([20, 21, 22], [30, 31, 32]), ([20, 21, 23], [33]), ([24], [34, 35])]
KVLINK = "kvlink:links=1,link_start=100,slots=5"
PARTS = [
    ("full", ()),
    ("block", ()),
    (KVLINK, ()),
    ("graph-kv", all_pairs(3)),
    ("graph-kv", ((0, 2),)),
    ("pcw", ()),
]
HOLD = 0.3


def adapted(hf: Any) -> Any:
    """A peft model whose adapter isn't zero; the same every time."""
    torch.manual_seed(1)
    module = get_peft_model(hf, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return module.double()


@pytest.fixture(scope="module")
def student() -> tuple[models.Trainable, Any]:
    trainable = models.trainable(families.FAMILIES["llama"]())
    trainable.hf.double()
    return trainable, adapted(trainable.hf)


@pytest.fixture(scope="module")
def plain(student) -> Any:
    """The same with transformers' own attention, but with float64 angles: its own are float32."""
    hf = families.FAMILIES["llama"]().double()
    hf.set_attn_implementation("sdpa")
    hf.model.rotary_emb = student[0].hf.model.rotary_emb
    return adapted(hf)


def of(method: str, edges: Any) -> tuple[Example, Method]:
    return Example(ContextGraph(SEGMENTS, prefix=PREFIX, edges=edges), QUESTIONS), methods.parse(method)


def forward(plain: Any, method: str, edges: Any, query: list[int]) -> Tensor:
    """Log-probabilities after each token of a query [n, V], by one plain forward with the explicit mask of `Plan.dense`."""
    graph = ContextGraph(SEGMENTS, query, PREFIX, edges)
    d = methods.parse(method).plan(graph).dense()
    mask = torch.zeros(d.visible.shape, dtype=torch.float64).masked_fill(~torch.as_tensor(d.visible), -torch.inf)
    found = plain(
        input_ids=torch.as_tensor(d.tokens)[None],
        position_ids=torch.as_tensor(d.positions)[None],
        attention_mask=mask[None, None],
        use_cache=False,
    )
    return found.logits[0, -len(query) :].log_softmax(-1)


def by_hand(plain: Any) -> Tensor:
    """The loss by its definition: every question by itself, the teacher as one flat prompt without any mask of ours."""
    sums, counts = {True: torch.zeros(()), False: torch.zeros(())}, {True: 0, False: 0}
    for method, edges in PARTS:
        for i, (query, answer) in enumerate(QUESTIONS):
            text = [*query, *answer[:-1]]
            flat = [*PREFIX, *(token for segment in SEGMENTS for token in segment), *text]
            with torch.no_grad(), plain.disable_adapter():
                wanted = plain(input_ids=torch.tensor([flat]), use_cache=False).logits[0, -len(text) :].log_softmax(-1)
            rows = slice(1, None) if i == 1 else slice(None)  # what the second question begins with was learned already
            told = forward(plain, method, edges, text)[rows]
            sums[method == "full"] = sums[method == "full"] + kl_div(
                told, wanted[rows], log_target=True, reduction="sum"
            )
            counts[method == "full"] += len(told)
    return sums[False] / counts[False] + HOLD * sums[True] / counts[True]


def step_of(parts: Any, length: int) -> batches.Batch:
    """An optimizer step of these examples, packed."""
    sent = []
    for method, edges in parts:
        told, by = of(method, edges)
        asked = distill.everything(told)
        laid = lay(asked, by)
        sent.append(batches._sent(Drawn("c", told, by, laid, distill.taught(asked, laid))))
    return batches._packed(sent, length, batches.Cursor(), len(parts))


@pytest.mark.parametrize("length", [60, 2000])
def test_the_objective_is_that_of_plain_forwards_with_explicit_masks(student, plain, length):
    """Value and gradient, packed in many sequences and in one."""
    trainable, module = student
    step = step_of(PARTS, length)
    assert (len(step.sequences) > 1) == (length == 60) and step.lessons is not None
    module.zero_grad(), plain.zero_grad()
    total = 0.0
    for packed, lesson in zip(step.sequences, step.lessons, strict=True):
        with torch.no_grad(), module.disable_adapter():
            wanted = logits(trainable, lesson.taught, module=module)
        told = logits(trainable, packed, module=module)
        value = distill.loss(told, wanted, lesson.held, hold=HOLD, totals=step.totals)
        value.backward()
        total += value.item()
    expected = by_hand(plain)
    expected.backward()
    assert expected.item() > 0.01 and total == pytest.approx(expected.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert theirs.keys() == ours.keys() and all("lora" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4)


def test_what_several_queries_begin_with_is_learned_once():
    told, _ = of("block", ())
    learned = [question.learned for question in distill.everything(told).questions]
    assert learned[0] == (False, True, True, True, True, True)
    assert learned[1] == (False, False, True, True) and learned[2] == (False, True, True)


def test_random_edges_are_as_many_among_the_same_readers():
    graph = ContextGraph([[i, i] for i in range(6)], edges=[(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)])
    told = Example(graph, [((1,), (2,))])
    drawn = {with_edges(told, "random", random.Random(i)).graph.edges for i in range(20)}
    assert len(drawn) > 10
    for edges in drawn:
        assert sorted(reader for _, reader in edges) == sorted(reader for _, reader in graph.edges)
        assert not set(edges) & set(graph.edges) and all(source != reader for source, reader in edges)


# -- runs ------------------------------------------------------------------------------------------------------------

HOPS = "world:hops,questions=3,entities=2-2"


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


def tuning(model: str, **changes: Any) -> Config:
    """Six steps of distillation, by several methods."""
    components = (
        Component("hops", HOPS, ("full", "block", "graph-kv"), edges=("links", "random")),
        Component("linked", HOPS, ("kvlink:links=1,link_start=3,slots=14",)),
    )
    settings: dict[str, Any] = {"stages": (Stage(components, steps=6),), "objective": "distill", "trained": "lora"}
    return config(model, **settings | {"document_weight": 0.0, "lr": 1e-2, "lora_rank": 4, "evaluation": 0} | changes)


def test_a_resumed_distillation_is_the_unbroken_one_with_any_number_of_workers(llama, tmp_path):
    whole = tuning(llama)
    train(whole, tmp_path / "a")
    for limit, workers in ((2, 1), (4, 3), (0, 2)) if SOAK else ((3, 3), (0, 2)):
        train(replace(whole, limit=limit, workers=workers), tmp_path / "b")
    assert steps(tmp_path / "b") == steps(tmp_path / "a")


def test_a_distillation_learns(llama, tmp_path):
    only = Stage((Component("hops", HOPS, ("block",)),), steps=16)
    train(tuning(llama, stages=(only,), lr=1e-2, batch=8, length=2048), tmp_path)
    losses = [row["loss"] for row in steps(tmp_path)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_distillation_starts_from_nothing_to_learn_under_full(llama, tmp_path):
    """Before the first step the model is its own teacher."""
    only = Stage((Component("hops", HOPS, ("full",)),), steps=1)
    train(tuning(llama, stages=(only,), hold=1.0, lr=1e-9), tmp_path)
    assert steps(tmp_path)[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_an_adapter_is_an_ordinary_peft_folder_that_a_run_goes_on_from(llama, tmp_path):
    train(tuning(llama), tmp_path / "first")
    saved = checkpoint.found(tmp_path / "first")[-1]
    card = (saved / "adapter" / "README.md").read_text()
    assert f'base_model: "{llama}"' in card and '"tuned_for": ["block", "graph-kv", "kvlink"]' in card
    base = models.load(llama).hf
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    merged = models.load(saved / "model").hf(tokens).logits
    assert not torch.allclose(base(tokens).logits, merged, atol=1e-2)
    wrapped = PeftModel.from_pretrained(base, str(saved / "adapter"))
    torch.testing.assert_close(wrapped(tokens).logits, merged, atol=1e-4, rtol=1e-4)

    again = tuning(llama, adapter=str(saved / "adapter"), limit=1)
    trainer = Trainer(again, tmp_path / "second", True, False)
    ours = {name: p for name, p in trainer.module.named_parameters() if f".{STUDENT}." in name}
    assert all(torch.equal(p, dict(wrapped.named_parameters())[name]) for name, p in ours.items() if p.requires_grad)
    with trainer.student.teaching():  # the teacher is the adapter as it was
        assert trainer.module.active_adapter == "teacher"
    assert trainer.module.active_adapter == STUDENT
    trainer.run()
    trainer.log.close()
    assert not torch.equal(models.load(checkpoint.found(tmp_path / "second")[-1] / "model").hf(tokens).logits, merged)


def test_a_run_ends_when_its_time_is_over(llama, tmp_path):
    found = train(tuning(llama, minutes=1e-4), tmp_path)
    assert found.step == 1 and found.signal is None and (found.checkpoint / "adapter").is_dir()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trained": "all"}, "train a lora adapter or links"),
        ({"document_weight": 0.5}, "leave document_weight out"),
        ({"adapter": "x", "trained": "links"}, "set trained to lora"),
    ],
)
def test_what_can_not_be_distilled_is_refused(changes, says):
    with pytest.raises(TrainError, match=says):
        tuning("m", **changes)


# -- records and the table -------------------------------------------------------------------------------------------

DOCUMENTS = [
    {"title": f"Number {i}", "text": f"The number {i} comes after {i - 1}, and before {i + 1}."} for i in range(4)
]
ASKED = [{"question": "What comes after 1?", "answer": "2"}, {"question": "What comes before 1?", "answer": "0"}]
RECORD = {"id": "r", "task": "nq", "documents": DOCUMENTS, "questions": ASKED, "links": [[0, 1]]}


def test_a_record_with_several_questions_is_the_records_with_one(llama):
    tokenizer = models.load_tokenizer(llama)
    whole = example(RECORD, tokenizer)
    one = [example({k: v for k, v in RECORD.items() if k != "questions"} | asked, tokenizer) for asked in ASKED]
    assert whole is not None and all(part is not None and part.graph == whole.graph for part in one)
    assert whole.questions == tuple(part.questions[0] for part in one if part is not None)


def test_recitations_ask_for_a_title_or_the_first_words(llama):
    tokenizer = models.load_tokenizer(llama)
    untitled = [DOCUMENTS[0], *({**d, "title": "Same"} for d in DOCUMENTS[1:3])]
    made = example(RECORD | {"documents": untitled}, tokenizer, recite=9, seed="s")
    assert made is not None and len(made.questions) == 2 + 3
    assert recitation(untitled, 0) == 'Quote the passage titled "Number 0".'
    assert recitation(untitled, 1) == 'Quote the passage that begins with "The number 1 comes after 0,".'
    asked = [tokenizer.encode(recitation(untitled, i), add_special_tokens=False) for i in range(3)]
    assert sorted(q.query[: len(asked[0])] for q in made.questions[2:])[0] in map(tuple, asked)
    assert example(RECORD, tokenizer, recite=2, seed="s") == example(RECORD, tokenizer, recite=2, seed="s")
    assert example(RECORD | {"questions": []}, tokenizer) is None
    assert example(RECORD | {"questions": []}, tokenizer, recite=1) is not None


def prepared(folder: Path, records: list[Any]) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "prepared.json").write_text('{"finished": true}')
    return folder


def test_attempts_are_what_a_mixture_draws(llama, tmp_path):
    prepared(tmp_path / "some", [RECORD | {"id": str(i)} for i in range(5)])
    records = Records(tmp_path / "some", "train", models.load_tokenizer(llama))
    component = Component("c", "some", ("block", "full"))
    one, other = (Mixture([component], [records], 0, length=4096, limit=4096) for _ in range(2))
    attempts = one.attempts()
    for _ in range(7):
        (a,), (b,) = one.made(next(attempts)), other.draw()
        assert a.method == b.method and torch.equal(a.laid.tokens, b.laid.tokens)


def test_the_table_says_what_composing_costs_and_what_an_adapter_gives_back(llama, tmp_path):
    """Every number against a plain loop over the questions."""
    trainable = models.trainable(models.load(llama).hf)
    module = get_peft_model(trainable.hf, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    tokenizer = models.load_tokenizer(llama)
    records = Records(
        prepared(tmp_path / "d", [RECORD | {"id": str(i)} for i in range(3)]), "validation", tokenizer, recite=1
    )

    def run(packed: Packed) -> Tensor:
        return logits(trainable, packed, module=module)

    def tuned() -> Any:
        module.set_adapter(STUDENT)
        return torch.no_grad()

    ways = [("block", "none"), ("graph-kv", "links")]
    scored = list(gap.score(run, {"base": module.disable_adapter, "tuned": tuned}, records, range(3), ways, 1500))
    assert len(scored) == 3 * 3 * 3 * 2  # records, questions, methods, states
    told = records[1]
    assert told is not None
    for state in ("base", "tuned"):
        for i, question in enumerate(told.questions):
            only = Example(ContextGraph(told.graph.segments, prefix=told.graph.prefix), [question])
            with torch.no_grad():
                with module.disable_adapter():
                    wanted = run(lay(only, methods.parse("full"))).log_softmax(-1)
                laid = lay(only, methods.parse("block"))
                if state == "base":
                    with module.disable_adapter():
                        found = run(laid).log_softmax(-1)
                else:
                    found = run(laid).log_softmax(-1)
            row = [r for r in scored if (r.record, r.state, r.method) == (1, state, "block")][i]
            assert row.kind == ("recitations" if i == 2 else "answers")
            nats = -found.gather(1, laid.targets[:, None]).mean().item()
            kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
            assert row.nats == pytest.approx(nats, abs=1e-4) and row.kl == pytest.approx(kl, abs=1e-4)
            assert row.agrees == pytest.approx((found.argmax(-1) == wanted.argmax(-1)).float().mean().item())
    lines = {(line.kind, line.method): line for line in gap.table(scored, "base", "tuned")}
    line = lines["answers", "block"]

    def mean(method: str, state: str) -> float:
        values = [r.nats for r in scored if (r.kind, r.method, r.state) == ("answers", method, state)]
        return sum(values) / len(values)

    before, after, full = mean("block", "base"), mean("block", "tuned"), mean("full", "base")
    assert line.answers == 6 and line.before == pytest.approx(before) and line.after == pytest.approx(after)
    assert line.closed == pytest.approx((before - after) / (before - full))
    assert "block" in gap.text(list(lines.values()))
