"""The tasks and recipes of docs/extending.md: their code, installed as a package, runs through the commands."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import installed
from kvgraph import demo
from kvgraph.data.tasks import TASKS
from kvgraph.train.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILE = re.compile(r'```python title="(.*?)"\n(.*?)```', re.DOTALL)
DECLARED = re.compile(r"```toml\n(.*?)```", re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning:UserWarning")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a part of the page as a package: its files, and the entry points that it declares."""

    def install(part: str) -> None:
        (text,) = re.findall(
            rf"^## {part}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
        for file, code in FILE.findall(text):
            (tmp_path / file).write_text(code)
        (declared,) = DECLARED.findall(text)
        groups = tomllib.loads(declared)["project"]["entry-points"]
        lines = [
            [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())] for group, names in groups.items()
        ]
        installed.declare(tmp_path, "extension", "\n".join(sum(lines, [])) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    with installed.looked_up_again((TASKS, RECIPES)):
        yield install
    for module in ("colours", "short"):
        sys.modules.pop(module, None)


def test_a_task_runs_through_eval_ablation_report_and_training_records(install, run, tmp_path):
    install("A task")
    facts = [f"The thing {i} is {colour}." for i, colour in enumerate(("red", "green", "blue"))]
    rows = [
        {"id": f"q{i}", "question": f"Which colour has thing {i}?", "answer": "red", "facts": facts, "gold": i}
        for i in range(3)
    ]
    data, model, out = tmp_path / "colours.JSON", tmp_path / "model", tmp_path / "runs"
    data.write_text(json.dumps(rows))
    model.mkdir()
    demo.write_model(model)
    code, listed, _ = run("eval", "--list")
    assert code == 0 and "colours of things" in listed
    words = ("--task", "colours", "--method", "graph-kv", "--model", model, "--data", data, "--no-check")
    code, _, err = run("eval", *words, "--method", "block", "--out", out)
    assert code == 0, err
    lines = [json.loads(x) for x in (out / "colours" / "graph-kv" / "results.jsonl").read_text().splitlines()]
    assert [(x["id"], x["golds"], x["edges"]) for x in lines] == [
        ("q0", ["red"], [[1, 0], [2, 0]]),
        ("q1", ["red"], [[0, 1], [2, 1]]),
        ("q2", ["red"], [[0, 2], [1, 2]]),
    ]
    code, shown, err = run("eval", *words, "--ablate", "reversed-edges,order", "--out", out)
    assert code == 0 and "reversed-edges" in shown and "order-random" in shown, err
    code, _, err = run("report", out, "--out", tmp_path / "report.html", "--markdown", tmp_path / "report.md")
    assert code == 0 and "colours" in (tmp_path / "report.md").read_text(), err

    from kvgraph.models import load_tokenizer
    from kvgraph.train.records import example

    record = {"task": "colours", "question": "Which?", "answer": "red"}
    made = example(record | {"documents": [{"title": "", "text": facts[0]}]}, load_tokenizer(model))
    assert made is not None and len(made.graph.segments) == 1


def test_a_recipe_is_listed_and_trains(install, run, tmp_path):
    install("A training recipe")
    assert "short" in run("train", "--list")[1]
    code, _, err = run("train", "--recipe", "short", "--out", tmp_path / "run", "--precision", "float32")
    assert code == 0 and (tmp_path / "run" / "step-000002" / "model").is_dir(), err


def test_what_a_part_declares_is_gone_in_the_next_test():
    assert "colours" not in TASKS and "short" not in RECIPES
