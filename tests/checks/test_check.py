"""The gate must pass on every supported family, and fail when anything about composition is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import families
from kvgraph import Engine, GraphError, ModelError, models
from kvgraph.checks import gate as check
from kvgraph.checks.quality import quality, read_items
from kvgraph.engine.engine import composed
from kvgraph.graph import ContextGraph

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_gate_passes(family):
    model = models.wrap(families.FAMILIES[family]())
    cases = check.gate(model, composed(model))
    assert all(c.passed and c.worst is not None for c in cases), cases
    windows = {layer.window for layer in model.layers} - {None}
    assert ("sliding" in {c.name for c in cases}) == bool(windows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_gate_passes_in_16_bits(family, dtype):
    model = models.wrap(families.FAMILIES[family]().to(dtype))
    assert all(c.passed for c in check.gate(model, composed(model)))


def test_in_16_bits_a_doubtful_first_draw_is_drawn_again():
    model = models.wrap(families.FAMILIES["llama"]().to(torch.bfloat16))
    plain, asked = composed(model), []

    def off(by: list[float]) -> list[check.Case]:
        """The gate's cases where the n-th of a case's draws is off by so many standard deviations."""
        asked.clear()

        def logits(plan):
            asked.append(plan)
            found = plain(plan).clone()
            found[0] += by[(len({id(plan) for plan in asked}) - 1) % len(by)] * found.std()
            return found

        return check.gate(model, logits)

    assert all(case.passed for case in off([0.1])) and len({id(plan) for plan in asked}) == 8
    assert not any(case.passed for case in off([1.0, 1.0, 1.0])) and len({id(plan) for plan in asked}) == 24
    assert all(case.passed for case in off([1.0, 0.1, 0.1])) and len({id(plan) for plan in asked}) == 24


def break_rotation(monkeypatch):
    from kvgraph.attention.rope import Rotary

    original = Rotary.table
    monkeypatch.setattr(Rotary, "table", lambda self, delta: original(self, delta + 1))


def break_merge(monkeypatch):
    from kvgraph.attention import step

    original = step._merge
    monkeypatch.setattr(
        step, "_merge", lambda out, lse, seen, seen_lse, *rest: original(out, lse, seen, seen_lse + 1, *rest)
    )


def break_kernel(monkeypatch):
    from kvgraph.attention.backends import compiled

    original = compiled.attend
    monkeypatch.setattr(compiled, "attend", lambda q, parts, scale, *rest: original(q, parts, 2 * scale, *rest))


def break_window(monkeypatch):
    from kvgraph.attention import step

    original = step.Step._build
    monkeypatch.setattr(step.Step, "_build", lambda self, window: original(self, None))


@pytest.mark.parametrize(
    ("family", "damage", "case"),
    [
        ("llama", break_rotation, "alone"),
        ("llama", break_merge, "chain"),
        ("llama", break_kernel, "token"),
        ("mistral", break_window, "sliding"),
    ],
)
def test_gate_fails_when_composition_is_wrong(family, damage, case, monkeypatch, tmp_path):
    model = models.wrap(families.FAMILIES[family]())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    damage(monkeypatch)
    assert case in {c.name for c in check.gate(model, composed(model)) if not c.passed}
    with pytest.raises(ModelError, match=rf"fails the gate.*{case}.*kvgraph check"):
        check.require(model, composed(model))


def test_a_pass_is_remembered_but_never_a_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = models.wrap(families.FAMILIES["llama"]())
    with monkeypatch.context() as broken:
        break_rotation(broken)
        for _ in range(2):
            with pytest.raises(ModelError):
                check.require(model, composed(model))
    check.require(model, composed(model))
    monkeypatch.setattr(check, "gate", lambda *a, **k: pytest.fail("the gate ran again"))
    check.require(model, composed(model))
    with pytest.raises(pytest.fail.Exception):
        other = models.wrap(families.FAMILIES["qwen2"]())
        check.require(other, composed(other))


def test_quality_is_zero_loss_for_full_and_measures_others():
    engine = Engine(models.wrap(families.FAMILIES["llama"]()), kv_budget=1 << 26)
    items = [
        (ContextGraph([[1, 2, 3], [4, 5, 6, 7]], query=[8, 9]), [10, 11]),
        (ContextGraph([[3, 1]], query=[7]), [2]),
    ]
    # What is computed rounds in another order than what is read, so the two sides of `full` differ in the last bits.
    same = quality(engine.scores, "full", items)
    assert same.nll == pytest.approx(same.full_nll, abs=1e-5) and same.tokens == 3
    other = quality(engine.scores, "block", items)
    assert other.full_nll == pytest.approx(same.nll, abs=1e-5) and abs(other.nll - other.full_nll) > 1e-3


def test_items_are_read_or_refused_with_their_line(tmp_path):
    good = {"question": "q?", "answer": "a", "documents": ["one", {"title": "t", "text": "two"}], "edges": [[0, 1]]}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({"question": "q"}) + "\n")
    with pytest.raises(GraphError, match=r'items.jsonl:3: needs "answer", which must be non-empty text'):
        read_items(path)
    ((graph, answer),) = read_items(path, limit=1)
    assert answer == "a" and graph.segments == ("one", "t\ntwo\n") and graph.edges == ((0, 1),)
    with pytest.raises(GraphError, match="can't read"):
        read_items(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"documents": "abc"}, 'needs "documents", a list .*; it is "abc"'),
        ({"documents": ["one", 2]}, "document 1 must be text"),
        ({"documents": [{"title": "t"}]}, "document 0 must be text"),
        ({"documents": None}, 'needs "documents".*; it is null'),
        ({"answer": None}, 'needs "answer".*; it is null'),
        ({"answer": " "}, 'needs "answer"'),
        ({"question": ""}, 'needs "question"'),
        ({"question": ["q"]}, 'needs "question"'),
        ({"prefix": 5}, '"prefix" must be text; it is 5'),
        ({"edges": [[0, 1, 1]]}, '"edges" must be a list of pairs'),
        ({"edges": "01"}, '"edges" must be a list of pairs'),
        ({"edges": [[0, 7]]}, "7"),
        ({"edges": [[0, True]]}, "True"),
    ],
)
def test_an_item_with_a_wrong_type_is_refused_with_its_line(tmp_path, change, says):
    item = {"question": "q?", "answer": "a", "documents": ["one", "two"], "edges": [[0, 1]]}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(item) + "\n" + json.dumps(item | change) + "\n")
    with pytest.raises(GraphError, match=rf"items.jsonl:2: .*{says}"):
        read_items(path)


@pytest.mark.parametrize(
    ("line", "says"), [("[1]", ":1 holds a list; every record must be a JSON object"), ('{"a"', ":1 is not JSON")]
)
def test_a_line_that_is_no_item_is_refused(tmp_path, line, says):
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(GraphError, match=says) as error:
        read_items(path)
    assert "Error" not in str(error.value)
