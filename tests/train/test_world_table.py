"""The world table: answers judged in packed forwards, against the engine; what is counted; and what is written."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from families import build
from kvgraph.data.world.world import CHUNKS, HOPS, KINDS, World
from kvgraph.engine.sampling import SamplingParams
from kvgraph.train import start
from kvgraph.train.example import Example, Question

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks aren't installed
from benchmarks import summary
from benchmarks import world as table
from benchmarks.world import AFTER, BEFORE, Case
from soak import some

CASES = list(table.cases())
BY_ROW = {case.row: case for case in CASES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """An untrained model of the world: it gives wrong answers, but always the same ones."""
    path = tmp_path_factory.mktemp("world") / "model"
    start.write(path, seed=3)
    return str(path)


@pytest.fixture(scope="module")
def model(folder) -> table.Learned:
    return table.load(folder)


def in_its_own_words(model: table.Learned, asked: table.Asked) -> table.Asked:
    """The same questions, with what the engine answers as the answers that are wanted."""
    examples = []
    for example in asked.examples:
        graphs = [example.graph.with_query(question.query) for question in example.questions]
        results = model.engine.generate(graphs, asked.method, SamplingParams(max_tokens=3, ignore_eos=True))
        answers = [tuple(result.token_ids) for result in results]
        questions = [Question(q.query, answer) for q, answer in zip(example.questions, answers, strict=True)]
        examples.append(Example(example.graph, questions))
    packed = table.laid_out(examples, [asked.method] * len(examples)) if asked.packed else []
    return asked._replace(examples=examples, packed=packed)


def spoilt(asked: table.Asked) -> table.Asked:
    """The same with another last token of every answer."""
    examples = [
        Example(e.graph, [q._replace(answer=(*q.answer[:-1], q.answer[-1] ^ 1)) for q in e.questions])
        for e in asked.examples
    ]
    packed = table.laid_out(examples, [asked.method] * len(examples)) if asked.packed else []
    return asked._replace(examples=examples, packed=packed)


@pytest.mark.parametrize("row", some([*table.SPECS, "graph-kv, random edges"], 5))
def test_an_answer_is_right_when_the_engine_gives_it(model, row):
    case = next(case for case in CASES if case.row in (row, f"{row} (pcw)"))
    asked = in_its_own_words(model, table.asked(case, model.engine.model.tokenizer, 2))
    found = table.answered(model, asked)
    assert len(found) == len(asked.wanted) and all(lead > -table.TIE for lead in found)
    assert all(lead < table.TIE for lead in table.answered(model, spoilt(asked)))


@pytest.mark.parametrize("row", ["full", "kvlink, 4 links", "graph-kv", "cacheblend", "ape"])
def test_the_sample_shows_a_judgement_that_the_engine_does_not_share(model, row):
    asked = table.asked(BY_ROW[row], model.engine.model.tokenizer, 2)
    found = table.answered(model, asked)
    assert table.compared(model, asked, found) == (table.CHECKED, 0)
    assert table.compared(model, asked, [-lead for lead in found]) == (table.CHECKED, table.CHECKED)
    assert table.compared(model, asked, [table.TIE / 2] * len(found)) == (0, 0)  # a tie says nothing


def test_all_cases_of_a_kind_ask_the_same_questions(model):
    tokenizer = model.engine.model.tokenizer
    for kind in KINDS:
        asked = [table.asked(case, tokenizer, 3) for case in CASES if case.kind == kind]
        own = [
            [
                (w, q)
                for w, q in zip(a.wanted, (q for e in a.examples for q in e.questions), strict=True)
                if not w.follows
            ]
            for a in asked
        ]
        assert len(own) > 8 and all(questions == own[0] for questions in own)


def test_wrong_edges_are_also_asked_for_what_they_say(model):
    tokenizer = model.engine.model.tokenizer
    for case in (BY_ROW["graph-kv, wrong edges"], BY_ROW["graph-kv, half of edges wrong"]):
        asked = table.asked(case, tokenizer, 6)
        questions = [q for e in asked.examples for q in e.questions]
        by_query: dict = {}
        for wanted, question in zip(asked.wanted, questions, strict=True):
            by_query.setdefault((wanted.corpus, question.query), []).append((wanted.follows, question.answer))
        follows = [answers for answers in by_query.values() if len(answers) == 2]
        assert all([f for f, _ in answers] == [False, True] and answers[0][1] != answers[1][1] for answers in follows)
        pronouns = sum(w.kind == "pronoun" and not w.follows for w in asked.wanted)
        assert 0 < len(follows) <= pronouns * (1 if "half" not in case.row else 0.9)
    assert not any(w.follows for w in table.asked(BY_ROW["graph-kv"], tokenizer, 3).wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_has_500_questions_about_names_that_are_held_out(kind):
    world = World.parse(kind, table.WORLDS[kind].partition(",")[2])
    corpora = [replace(world, seed=table.SEED).corpus(i) for i in range(table.CORPORA[kind])]
    counts = Counter(question.kind for corpus in corpora for question in corpus.questions)
    assert min(counts.values()) >= 500, counts
    assert all("held-out" in corpus.id for corpus in corpora)


def test_the_table_has_every_method_and_control():
    hops = [case.row for case in CASES if case.kind == HOPS]
    assert hops == [name for name in table.SPECS if name != "kvlink, 1 link"]
    chunks = Counter(case.row for case in CASES if case.kind == CHUNKS)
    assert {row for row, count in chunks.items() if count == 1} == {row for row in chunks if "sorted" in row}
    assert len(chunks) == 9 + 6 + 9 and sum("edges" in row for row in chunks) == 6
    for case in CASES:
        World.parse(case.kind, case.settings)  # none of them is misspelt


# -- what is counted --------------------------------------------------------------------------------------------------

WANTED = [
    table.Wanted("named", "a", 0.25),
    table.Wanted("pronoun", "a", 0.5),
    table.Wanted("pronoun", "b", 0.25),
    table.Wanted("pronoun", "b", 0.0, follows=True),
]


def counted() -> list[dict]:
    case = Case(CHUNKS, "graph-kv, wrong edges", "graph-kv", "order=shuffled,edges=wrong")
    asked = table.Asked(table.methods.get("graph-kv"), [], WANTED, [])
    return list(table.cells(case, AFTER, asked, [[1.0, 0.5, -0.1, 2.0], [1.0, -3.0, -0.1, -2.0]]))


def test_a_cell_is_the_mean_over_models_with_the_share_of_each():
    named, pronoun = counted()
    assert (named["question"], named["mean"], named["floor"], named["follows"]) == ("named", 1.0, 0.25, None)
    assert (pronoun["n"], pronoun["mean"], pronoun["floor"]) == (2, 0.25, 0.375)
    assert pronoun["seeds"] == [0.5, 0.0] and pronoun["follows"] == 0.5
    assert 0 <= pronoun["low"] < 0.25 < pronoun["high"] <= 1


def test_the_tables_show_floors_intervals_and_the_range_of_models():
    found = {"cells": [*counted(), counted()[0] | {"stage": BEFORE, "seeds": [0.5], "mean": 0.5}]}
    (title, rows), (before, _) = table.tables(found)
    assert (title, before) == tuple(f"Chunks that need each other, {stage} mixed training" for stage in (AFTER, BEFORE))
    guessing, right, said = rows
    assert guessing == {"% right": "guessing", "named, shuffled": "25.0", "pronoun, shuffled": "37.5"}
    assert right["pronoun, shuffled"].startswith("25.0 [") and right["pronoun, shuffled"].endswith("] 0.0–50.0")
    assert said == {"% right": "graph-kv, wrong edges: what these say", "pronoun, shuffled": "50.0"}


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch) -> None:
    """Six cases instead of fifty."""
    wanted = [(HOPS, "full", 1), (CHUNKS, "full", 1), (CHUNKS, "kvlink, 4 links", 1), (CHUNKS, "graph-kv", 2)]
    wanted.append((CHUNKS, "graph-kv, wrong edges", 1))
    chosen = [
        case for kind, row, most in wanted for case in [c for c in CASES if (c.kind, c.row) == (kind, row)][:most]
    ]
    monkeypatch.setattr(table, "cases", lambda: chosen)


def run(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/world.py", *map(str, words)])
    table.main()


def test_the_command_writes_json_markdown_and_the_model_card(few, monkeypatch, folder, tmp_path, capsys):
    card = Path(folder) / "README.md"
    card.write_text(
        f"---\nkvgraph:\n  tuned_for: [block]\n---\nbefore\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter\n"
    )
    out = tmp_path / "results" / "world.json"
    run(monkeypatch, folder, folder, "--before", folder, "--share", 0.02, "--out", out, "--card")
    told = capsys.readouterr().out
    assert told.count("mixed training") == 4 and "(goal: ≥ 95 in any order)" in told
    found = json.loads(out.read_text())
    assert (
        found["environment"]["command"].startswith("python -m benchmarks.world ")
        and found["compared"] == 6 * 3 * table.CHECKED
    )
    assert {len(cell["seeds"]) for cell in found["cells"] if cell["stage"] == AFTER} == {2}
    once, text = card.read_text(), "\n".join(summary.section(found))
    assert once.startswith("---\nkvgraph:\n  tuned_for: [block]\n---\nbefore\n") and once.endswith(
        f"{table.MARKS[1]}\nafter\n"
    )
    assert "old" not in once and "| graph-kv, wrong edges: what these say |" in once
    assert re.search(r"\| [\d.]+ \[[\d.]+, [\d.]+\] ([\d.]+)–\1 \|", text)  # two models, the same one, so with a range
    alone = table.measure([folder], [folder], 0.02)
    assert "alone" not in alone
    shown = once.split(table.MARKS[0])[1].split(table.MARKS[1])[0].strip()
    assert shown == "\n".join(table.markdown(alone))  # the card has the first model's own tables
    table.write_card(folder, alone)
    assert card.read_text() == once


def test_goals_are_for_the_first_model_and_name_the_cell():
    def cell(row, question, *seeds, kind="hops", order=""):
        return {
            "stage": AFTER,
            "kind": kind,
            "row": row,
            "order": order,
            "question": question,
            "floor": 0.3,
            "seeds": seeds,
        }

    questions = ("1-hop", "2-hop", "3-hop", "comparison")
    found = [
        cell(row, q, 0.97, 0.1) for row in ("full", "block", "kvlink, 4 links", "graph-kv", "ape") for q in questions
    ]
    rows = ("full", "kvlink, 4 links", "graph-kv")
    found += [
        cell(row, "pronoun", 0.96, 0.1, kind="chunks", order=order) for row in rows for order in ("kept", "shuffled")
    ]
    found[5]["seeds"], found[17]["seeds"] = (0.9, 1.0), (0.5, 1.0)  # block's and ape's 2-hop
    found[10]["seeds"] = (0.99, 0.0)  # kvlink's 3-hop
    found[-6]["seeds"], found[-5]["seeds"], found[-1]["seeds"] = (0.8, 1.0), (0.1, 1.0), (0.7, 1.0)
    assert [measured for measured, _ in table.goals(found).values()] == [
        "90.0 (block, 2-hop)",
        "50.0 (ape, 2-hop)",
        "70.0 (graph-kv, pronoun, shuffled)",
        "80.0 (full, pronoun, in order)",
        "96.0 (kvlink, 4 links, pronoun, in order)",
        "99.0 (kvlink, 4 links, 3-hop), floor 30.0",
        "97.0 (full, comparison), floor 30.0",
    ]


def test_an_answer_judged_otherwise_by_the_engine_ends_the_command(few, monkeypatch, folder):
    monkeypatch.setattr(table, "answered", lambda model, asked: [1.0] * len(asked.wanted))
    with pytest.raises(SystemExit, match=r"full \(hops .*: the engine answers 8 of 8 questions otherwise"):
        table.measure([folder], [], 0.02)


def test_a_card_without_marks_and_a_foreign_model_are_clear_errors(tmp_path):
    with pytest.raises(SystemExit, match=r"README\.md must hold the lines"):
        table.write_card(tmp_path, {"cells": []})
    with pytest.raises(SystemExit, match="there is no folder"):
        table.load(str(tmp_path / "none"))
    build("Llama").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="hasn't the world's tokenizer"):
        table.load(str(tmp_path))
