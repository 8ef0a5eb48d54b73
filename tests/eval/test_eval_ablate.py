"""Ablations change the one thing they name and nothing else, and their table compares what really ran."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from kvgraph import Engine, GraphError, demo, models
from kvgraph.cli import main
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.task import Item, Task
from kvgraph.edges import chain
from kvgraph.eval import ablate, runs
from kvgraph.eval.ablate import ABLATIONS, BASE, Variant, indexed_edges, variants
from kvgraph.graph import ContextGraph
from kvgraph.methods import Block, GraphKV, get

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning:UserWarning")

TASK = Task(
    name="made-up",
    about="",
    source="",
    items=lambda records: (),
    instruction="Read.",
    question="{question}",
    max_tokens=3,
    metrics=("substring_em", "f1"),
    edges="links",
    breakdowns=("kind", "distractors"),
)


def item(name: str = "a", links=((1, 0), (2, 0), (3, 2)), **facts) -> Item:
    texts = ("one fact", "two facts, longer", "3", "the fourth", "and five")
    return Item(
        id=name,
        question=f"which, {name}?",
        references=("e",),
        documents=tuple(Document(f"{text} {name}", f"T{i}") for i, text in enumerate(texts)),
        links=links,
        facts=facts or {"gold_positions": "1,3", "distractors": 3},
    )


def base(method=None, edges="links", items=None) -> Variant:
    return Variant(BASE, "", method or GraphKV(), items or [item(name) for name in "abc"], edges)


def named(made: list[Variant]) -> dict[str, Variant]:
    return {variant.name: variant for variant in made}


def one(name: str, start: Variant, variant: str | None = None, seed: int = 0) -> Variant:
    made, _ = variants(start, [name], seed)
    return named(made)[variant or name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    demo.write_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return models.load(str(folder))


# -- mask and positions -----------------------------------------------------------------------------------------------


def graph(edges=()) -> ContextGraph:
    return ContextGraph([[1, 2], [3], [], [4, 5, 6]], [9], [7, 8], edges)


def positions(method, g) -> dict[str, list[int]]:
    return {span.name: list(span.positions) for span in method.plan(g).spans}


def test_the_sequential_layout_shares_no_position():
    """Prefix 2, documents 2 + 1 + 3 = 6 tokens: round r starts at 2 + 6 r, the query after the last round in use."""
    assert positions(GraphKV(rounds=2, keep="all", layout="sequential"), graph(chain(2) + ((1, 3),))) == {
        "prefix": [0, 1],
        "doc 0": [2, 3],
        "doc 1": [4],
        "doc 3": [5, 6, 7],
        "doc 1 · round 1": [10],
        "doc 3 · round 2": [17, 18, 19],
        "query": [20],
    }


def test_the_sequential_layout_without_edges_is_block():
    assert GraphKV(layout="sequential").plan(graph()) == Block().plan(graph())


def test_a_sequential_reader_sees_its_whole_sources_wherever_they_stand():
    plan = GraphKV(layout="sequential").plan(graph(((3, 0),)))
    reader = next(span for span in plan.spans if span.name == "doc 0 · round 1")
    source = plan.spans[reader.sees[0].span]
    assert source.name == "doc 3" and reader.sees[0].at + len(source) <= reader.start


def test_mask_and_positions_are_taken_apart():
    start = base(GraphKV(rounds=2, band=99))
    made = named(variants(start, ["mask-positions"])[0])
    assert made["mask-only"].method == GraphKV(rounds=2, layout="sequential")
    assert made["mask-only"].edges == "links" and made["mask-only"].items == start.items
    assert made["positions-only"].method == start.method and made["positions-only"].edges == "none"
    neither = made["neither"]
    plain = ContextGraph([[1], [2, 3]], [9])
    assert neither.edges == "none" and neither.method.plan(plain) == Block().plan(plain)


# -- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", ["links", "top-k:2", "layers:1-2", "chain"])
def test_random_edges_change_only_the_edges(model, edges):
    """Through the real prompt and engine: equal texts, tokens, positions, number of edges and readers; other edges."""
    start = base(GraphKV(rounds=2), edges)
    drawn = one("random-edges", start)
    assert drawn.method == start.method and drawn.edges == "links"
    with Engine(model) as engine:
        for before, after in zip(start.items, drawn.items, strict=True):
            assert replace(after, links=before.links) == before
            old, new = indexed_edges(before, edges), indexed_edges(after, drawn.edges)
            assert len(new) == len(old) and set(new) != set(old)
            assert degrees(new) == degrees(old)
            graphs = [
                prompt.build(TASK, it, model.tokenizer).graph(spec_edges)
                for it, spec_edges in ((before, old), (after, new))
            ]
            assert graphs[0].segments == graphs[1].segments and graphs[0].prefix == graphs[1].prefix
            plans = [engine.plan(g, start.method) for g in graphs]
            assert plans[0].prompt.tokens == plans[1].prompt.tokens
            assert plans[0].prompt.positions == plans[1].prompt.positions
            assert {s.start for s in plans[0].spans} == {s.start for s in plans[1].spans}
            assert len(plans[0].spans) == len(plans[1].spans)


def degrees(edges) -> list[tuple[int, int]]:
    """(edges in, edges out) of every document, sorted: what stays when only the names of documents change."""
    nodes = {node for edge in edges for node in edge}
    return sorted((sum(r == n for _, r in edges), sum(s == n for s, _ in edges)) for n in nodes)


def test_random_edges_depend_on_the_seed_and_the_item_alone():
    first, again = one("random-edges", base()), one("random-edges", base(items=[item(name) for name in "cba"]))
    assert {i.id: i.links for i in first.items} == {i.id: i.links for i in again.items}
    assert len({i.links for i in first.items}) > 1
    assert [i.links for i in first.items] != [i.links for i in one("random-edges", base(), seed=1).items]


def test_reversed_edges():
    assert one("reversed-edges", base()).items[0].links == ((0, 1), (0, 2), (2, 3))
    top = one("reversed-edges", base(edges="top-k:1"))
    assert top.edges == "links" and top.items[0].links == ((1, 0), (2, 0), (3, 0), (4, 0))


# -- rounds and versions ----------------------------------------------------------------------------------------------


def test_rounds_and_keep():
    deep = base(GraphKV(rounds=2), "chain")
    made = named(variants(deep, ["rounds", "keep"])[0])
    assert [name for name in made] == ["rounds-0", "rounds-1", "rounds-3", "keep-all"]
    assert made["rounds-0"].edges == "none" and made["rounds-3"].method.rounds == 3
    assert made["keep-all"].method == GraphKV(rounds=2, keep="all")
    assert one("keep", base(GraphKV(keep="all")), "keep-read").method == GraphKV()


# -- documents --------------------------------------------------------------------------------------------------------


def test_after_a_permutation_links_and_gold_follow_documents_and_shapes_follow_ranks():
    start = base()
    turned = one("order", start, "order-reversed").items[0]
    assert [d.title for d in turned.documents] == ["T4", "T3", "T2", "T1", "T0"]
    assert turned.facts == {"gold_positions": "1,3", "distractors": 3}
    assert titles(turned, turned.links) == titles(start.items[0], start.items[0].links)
    shaped = one("order", base(edges="top-k:1"), "order-reversed")
    assert shaped.edges == "top-k:1"
    assert {s for s, _ in indexed_edges(shaped.items[0], shaped.edges)} == {0}  # the new first document is read


def titles(it: Item, edges) -> set[tuple[str, str]]:
    return {(it.documents[s].title, it.documents[r].title) for s, r in edges}


def test_a_single_gold_position_follows_too():
    turned = one("order", base(items=[item(gold_position=4)]), "order-reversed").items[0]
    assert turned.facts == {"gold_position": 0}
    assert turned.documents[0].title == "T4"


def test_random_orders_are_drawn_for_each_item_by_the_seed():
    drawn = one("order", base(), "order-random")
    orders = [[d.title for d in it.documents] for it in drawn.items]
    assert all(sorted(order) == ["T0", "T1", "T2", "T3", "T4"] for order in orders)
    assert orders == [[d.title for d in it.documents] for it in one("order", base(), "order-random").items]
    assert len({tuple(order) for order in orders}) > 1


def test_distractors_leave_from_the_end_and_gold_stays():
    made = named(variants(base(Block(), "none"), ["distractors"])[0])
    assert list(made) == ["distractors-0", "distractors-1", "distractors-2"]
    none, single = made["distractors-0"].items[0], made["distractors-1"].items[0]
    assert [d.title for d in none.documents] == ["T1", "T3"]
    assert none.facts == {"gold_positions": "0,1", "distractors": 0} and none.links == ()
    assert [d.title for d in single.documents] == ["T0", "T1", "T3"]
    assert titles(single, single.links) == {("T1", "T0")}


def test_an_item_that_does_not_say_which_documents_are_gold_keeps_its_first():
    made = named(variants(base(Block(), "none", [replace(item(), facts={"hops": 2})]), ["distractors"])[0])
    assert [d.title for d in made["distractors-1"].items[0].documents] == ["T0", "T1"]
    assert made["distractors-1"].items[0].facts == {"hops": 2}


def test_a_fact_that_counts_groups_of_documents_goes_when_documents_go():
    groups = item(gold_positions="2,3", distractors=1, related="last")
    made = named(variants(base(Block(), "none", [groups]), ["distractors", "order"])[0])
    assert [d.title for d in made["distractors-0"].items[0].documents] == ["T2", "T3"]
    assert made["distractors-0"].items[0].facts == {"gold_positions": "0,1", "related": "last"}
    assert made["order-reversed"].items[0].facts["distractors"] == 1


# -- what is left out -------------------------------------------------------------------------------------------------


def test_variants_that_would_change_nothing_are_left_out_and_said():
    made, left_out = variants(base(edges="all"), list(ABLATIONS))
    assert "random-edges: gives the same plans as base" in left_out
    assert "reversed-edges: gives the same plans as base" in left_out
    assert "keep-all: gives the same plans as base" in left_out  # every standalone version is read already
    assert "rounds-0: gives the same plans as positions-only" in left_out
    assert "rounds-2" in named(made)


def test_a_tree_of_depth_one_has_no_second_round():
    _, left_out = variants(base(GraphKV(band=50), "star:0"), ["rounds"])
    assert left_out == ["rounds-2: gives the same plans as base", "rounds-3: gives the same plans as base"]


def test_a_method_without_edges_has_no_edges_to_change():
    made, left_out = variants(base(Block(), "none"), list(ABLATIONS))
    assert {name.split("-")[0] for name in named(made)} == {"order", "distractors"}
    assert [line.split(":")[0] for line in left_out] == list(ABLATIONS)[:5]
    assert all(line.endswith("would change nothing for block on these items") for line in left_out)


@pytest.mark.parametrize("method", ["graph-kv-rag", "graph-kv-ego"])
def test_released_layouts_have_their_ablations(method):
    made, _ = variants(base(get(method), "star:0"), list(ABLATIONS))
    assert {"random-edges", "order-reversed"} <= set(named(made))


def test_names():
    assert ablate.parse("all") == list(ABLATIONS)
    assert ablate.parse("order, rounds,order") == ["order", "rounds"]
    with pytest.raises(GraphError, match="there is no ablation 'round'; there are all, mask-positions, "):
        ablate.parse("round")


# -- running ----------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_run_and_the_table_compares_them(model, tmp_path):
    items = [with_equal_lengths(item(name)) for name in "abc"]
    names = ["mask-positions", "random-edges", "distractors"]
    table = ablate.run(lambda: Engine(model), TASK, GraphKV(), items, names, tmp_path)
    listed = [row.run.folder.name for row in table.rows]
    fewer = [f"distractors-{n}" for n in (0, 1, 2)]
    assert listed == ["base", "mask-only", "positions-only", "neither", "random-edges", *fewer]

    found = {run.folder.name: run for run in runs.find([tmp_path])}
    assert set(found) == set(listed)
    assert [found[name].ablation for name in listed] == [None, *listed[1:]]
    same = runs.changes(found["base"].summary, found["random-edges"].summary)
    config = {path for path, _, _ in same if path.split(".")[0] not in ("timing", "environment", "scores", "by")}
    assert config <= {"ablation", "items_sha256", "data.sha256", "finish.length", "finish.stop", "tokens.completion"}
    assert {"ablation", "items_sha256"} <= config
    for a, b in zip(found["base"].results, found["random-edges"].results, strict=True):
        assert a["usage"]["prompt_tokens"] == b["usage"]["prompt_tokens"]
        assert a["edges"] != b["edges"] and len(a["edges"]) == len(b["edges"])

    stored = json.loads((tmp_path / "table.json").read_text())
    assert [row["variant"] for row in stored["rows"]] == listed
    assert "difference" not in stored["rows"][0] and stored["rows"][1]["difference"]["n"] == 3
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("| variant |") and text.count("\n| ") == len(listed)
    assert all(line.count("|") == 6 for line in text.split("\n") if line.startswith("|"))

    before = (tmp_path / "random-edges" / "results.jsonl").read_bytes()
    assert ablate.run(lambda: Engine(model), TASK, GraphKV(), items, names, tmp_path) == table
    assert (tmp_path / "random-edges" / "results.jsonl").read_bytes() == before


def with_equal_lengths(it: Item) -> Item:
    """So that it doesn't matter to the number of tokens which documents are read again."""
    return replace(it, documents=tuple(Document(f"fact {i} of {it.id}", f"T{i}") for i in range(5)))


def test_the_command(folder, tmp_path, capsys):
    records = [
        {
            "_id": f"q{i}",
            "question": f"who, {i}?",
            "answer": "e",
            "type": "bridge",
            "level": "easy",
            "supporting_facts": [["A", 0]],
            "context": [["A", [f"first {i}"]], ["B", ["second"]], ["C", ["third"]]],
        }
        for i in range(3)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(records))
    words = ["eval", "--task", "hotpotqa", "--method", "graph-kv", "--model", str(folder), "--max-tokens", "2"]
    words += ["--data", str(tmp_path / "hotpot.json"), "--out", str(tmp_path / "out"), "--edges", "chain", "--no-check"]
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--ablate", "reversed-edges,rounds"])
    said = capsys.readouterr()
    assert not exit_.value.code, said.err
    for name in ("base", "reversed-edges", "rounds-0", "rounds-2"):
        assert f"\n{name} " in said.out
    assert "left out: rounds-3: gives the same plans as rounds-2" in said.err
    assert (tmp_path / "out" / "hotpotqa" / "graph-kv" / "ablations" / "table.md").is_file()
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--ablate", "nothing"])
    assert exit_.value.code == 1 and "there is no ablation 'nothing'" in capsys.readouterr().err


def test_engines_of_one_command_that_warn_alike_are_heard_once(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    for message in ("not tuned", "not tuned", "no room"):
        warnings.showwarning(UserWarning(message), UserWarning, "file.py", 1)
    assert capsys.readouterr().err == "kvgraph: warning: not tuned\nkvgraph: warning: no room\n"
