"""`kvgraph demo`: what it asks, what it tells, and the adapter that it brings."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from kvgraph import demo, methods
from kvgraph.cli import demo as command
from kvgraph.cli import main
from kvgraph.cli.demo import COLD, METHODS, RUNS, DemoAnswer, is_right, ranked, told
from kvgraph.models import adapters
from kvgraph.models.config import card, declared
from soak import SOAK

ROOT = Path(__file__).parents[2]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_every_question_is_asked_over_an_article_that_answers_it():
    assert len(demo.answered()) >= 6
    for question, answer in demo.answered():
        holding = [article.id for article in demo.articles() if answer in article.text]
        assert 1 <= len(holding) <= 2
        assert set(holding) & {article.id for article in ranked(question, demo.articles())[: command.READ]}, question


def test_the_articles_are_short_and_cite_each_other():
    assert all(80 <= len(article.text.split()) <= 150 for article in demo.articles())
    assert all(source != reader for source, reader in demo.citations())


def test_the_demo_of_another_model_runs_cold_warm_and_in_a_new_process(tmp_path, capsys, monkeypatch):
    model = tmp_path / "tiny"
    model.mkdir()
    for name, size in {"HIDDEN": 64, "LAYERS": 2, "HEADS": 2, "KV_HEADS": 1, "HEAD_DIM": 32, "MLP": 128}.items():
        monkeypatch.setattr(demo, name, size)  # it reads thousands of tokens of articles for a question
    demo.write_model(model)
    first = demo.answered()[: None if SOAK else 1]
    monkeypatch.setattr(demo, "answered", lambda: first)  # the new process asks them all
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the new process
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--model", str(model)])
    out = capsys.readouterr().out
    assert ended.value.code in (None, 0), out
    number = r"([\d,]+)"
    rows = re.findall(rf"^ *\d? +({'|'.join(METHODS)}) +.*?[✓✗] +{number} +{number} +{number} +{number} ", out, re.M)
    assert [row[0] for row in rows] == list(METHODS) * len(demo.answered())
    for _, cold, warm, restart, reused in rows:
        cold, warm, restart, reused = (int(text.replace(",", "")) for text in (cold, warm, restart, reused))
        assert warm == restart <= cold and reused > 1000  # one token a byte: the articles are long
    assert f"of {len(rows)} answers were the same tokens in all three runs" in out


def test_what_is_told_is_counted_from_the_answers():
    def answer(text: str, computed: int, token: int = 1) -> DemoAnswer:
        return DemoAnswer(text, [token], computed, 7, computed / 100)

    found = {(name, run): [answer("It is gold.", 50), answer("lead", 50)] for name in METHODS for run in RUNS}
    found["full", COLD] = [answer("Gold", 900), answer("silver", 700, token=2)]
    text = told(found, ["gold", "silver"])
    assert "full answers 2, block answers 1, kvlink answers 1, graph-kv answers 1" in text
    assert "full computed 800 tokens a question and block 50" in text
    assert "7 of 8 answers were the same tokens" in text
    assert is_right("the Rue Dauphine", "Rue Dauphine") and not is_right("", "Paris")


def test_the_adapter_is_small_named_for_its_base_and_says_what_it_is_tuned_for():
    folder = demo.adapter()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    config = json.loads((folder / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == BASE and config["trainable_token_indices"] == list(range(3, 17))
    assert declared(card(folder), "card") == ("block", "graph-kv", "kvlink")
    assert methods.parse(demo.KVLINK).own_tokens == tuple(range(3, 17))
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in demo.ADAPTER_FILES)


def test_the_base_is_the_file_that_a_package_brings_or_its_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(adapters.PACKAGED, BASE, ("a_package_with_a_model", "model.gguf"))
    assert adapters.base_of(demo.adapter()) == BASE
    package = tmp_path / "a_package_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert adapters.base_of(demo.adapter()) == BASE  # installed, without the file
    (package / "model.gguf").write_bytes(b"GGUF")
    assert adapters.base_of(demo.adapter()) == str(package / "model.gguf")
    assert not isinstance(sys.modules.get("a_package_with_a_model"), ModuleType)  # found without running it


def test_a_demo_without_its_adapter_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and out == "" and err.count("\n") == 1
    assert f"the adapter that ships with kvgraph lacks adapter_config.json in {tmp_path}" in err
