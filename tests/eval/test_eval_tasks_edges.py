"""Tasks whose edges the data really has: triples and hyperlinks, and the benchmark that compares edges on them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_eval_tasks_more import DATA, graph_of

from benchmarks import edges
from kvgraph import demo, models
from kvgraph.data.items import read
from kvgraph.data.task import Item, TaskError
from kvgraph.data.tasks import get
from kvgraph.data.tasks.triples import Triple, reads
from kvgraph.methods import GraphKV

SAMPLES = {  # task: (path, items, documents, links of all items together)
    "explagraphs": ("expla_graphs/expla_graphs_500.jsonl.gz", 500, 2130, 1458),
    "2wiki-triples": ("2wikimultihopqa/2wiki_train_500.jsonl.gz", 500, 6000, 1944),
}
EXPLAINED = {
    "arg1": "Cats are good.",
    "arg2": "Cats purr.",
    "label": "support",
    "graph": "(cat; does; purr)(purr; is; good)",
}
EVIDENCE = [
    {"_id": "a", "question": "Where was the maker of X born?", "answer": "Rome", "type": "compositional",
     "evidences": [["X", "maker", "Ann"], ["Ann", "place of birth", "Rome"]]},
    {"_id": "b", "question": "Who is older?", "answer": "Bob", "type": "comparison",
     "evidences": [["Bob", "date of birth", "1 May 1900"], ["Cid", "date of birth", "2 May 1900"]]},
]  # fmt: skip


def sample(name: str) -> Path:
    path = DATA / SAMPLES[name][0]
    if not path.exists():
        pytest.skip(f"no real input: {path} is missing; set KVGRAPH_DATA to the folder that has it")
    return path


def documentation(folder: Path) -> Path:
    """Pages of a small library: each of its functions refers to that of the next page."""
    folder.mkdir()
    for i in range(4):
        other = (i + 1) % 4
        (folder / f"m{i}.html").write_text(
            f'<h1 id="m{i}">Module {i}</h1><p>{"It has functions that do things. " * 20}</p>'
            f'<dl><dt id="m{i}.open">m{i}.open(path)</dt><dd><p>Return the opened file number {i} of them. See '
            f'<a href="m{other}.html#m{other}.open">m{other}.open()</a>. {"It may fail at times. " * 20}</p></dd></dl>'
        )
    return folder


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", SAMPLES)
def test_a_real_sample_is_read_completely(name):
    items = read(get(name), sample(name)).items
    counted = (len(items), sum(len(i.documents) for i in items), sum(len(i.links) for i in items))
    assert counted == SAMPLES[name][1:]
    for item in items:
        assert len({document.id for document in item.documents}) == len(item.documents)
        assert all(0 <= s < len(item.documents) and 0 <= r < len(item.documents) and s != r for s, r in item.links)
        GraphKV().plan(graph_of(get(name), item, GraphKV()))


def test_triples_read_those_that_end_where_they_begin():
    triples = [Triple("a", "x", "B"), Triple("b ", "y", "c"), Triple("c", "z", "a"), Triple("d", "z", "d")]
    assert set(reads(triples)) == {(0, 1), (1, 2), (2, 0)}


def test_explagraphs_asks_for_the_stance(tmp_path):
    (item,) = read(get("explagraphs"), written(tmp_path / "a.jsonl", [EXPLAINED])).items
    assert [d.text for d in item.documents] == ["cat does purr.", "purr is good."] and item.links == ((0, 1),)
    assert item.references == ("support",) and "Argument 2: Cats purr." in item.question
    with pytest.raises(TaskError, match="graph"):
        read(get("explagraphs"), written(tmp_path / "b.jsonl", [EXPLAINED | {"graph": "nothing"}]))


def test_2wiki_triples_stand_among_those_of_other_questions(tmp_path):
    first, second = read(get("2wiki-triples"), written(tmp_path / "a.jsonl", EVIDENCE)).items
    texts = [document.text for document in first.documents]
    assert sorted(texts) == sorted(document.text for document in second.documents) and len(texts) == 4
    (link,) = first.links
    assert [texts[i] for i in link] == ["X maker Ann.", "Ann place of birth Rome."]
    assert {texts[int(i)] for i in str(first.facts["gold_positions"]).split(",")} == {texts[i] for i in link}


def test_linked_docs_ask_what_a_link_leads_to(tmp_path):
    items = read(get("linked-docs"), documentation(tmp_path / "docs")).items
    assert len(items) == 4
    for item in items:
        ((source, reader),) = item.links
        assert item.references[0] in item.documents[source].text
        assert item.references[0].startswith("Return the opened file number")
        name = item.question.split(" refers to ")[1].split(". ")[0]
        assert f"{name}()" in item.documents[reader].text and f"{name}(path)" in item.documents[source].text
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.md").write_text("# Alone\n\nNothing.")
    with pytest.raises(TaskError, match="has no page that links to another"):
        read(get("linked-docs"), tmp_path / "alone")


# -- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> models.Model:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return models.load(folder)


def item_of(tmp_path: Path) -> Item:
    return read(get("2wiki-triples"), written(tmp_path / "a.jsonl", EVIDENCE)).items[0]


def test_other_edges_give_each_reader_as_many_sources(tmp_path):
    item = read(get("linked-docs"), documentation(tmp_path / "docs")).items[0]
    for one in (item, item_of(tmp_path)):
        degrees = Counter(reader for _, reader in one.links)
        for kind in (edges.RANDOM, edges.NEAR):
            made = edges.edges_of(one, kind)
            assert Counter(reader for _, reader in made) == degrees and all(s != r for s, r in made)
            assert made == edges.edges_of(one, kind)
        assert edges.edges_of(one, edges.TRUE) == one.links and edges.edges_of(one, edges.NONE) == ()


def test_near_sources_share_words():
    vectors = edges.weighed(["red fox runs", "a fox runs red", "blue sea"])
    assert edges.cosine(vectors[0], vectors[1]) > edges.cosine(vectors[0], vectors[2]) == 0
    assert edges.cosine(vectors[0], vectors[0]) == pytest.approx(1)


def test_long_documents_are_cut_to_one_length():
    assert edges._level([10, 20, 300], 100) == 70
    assert edges._level([10, 20], 100) == 20
    assert edges._level([50, 50], 10) == 5


@pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
def test_a_stopped_benchmark_continues_and_makes_its_table(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(edges, "ANSWER_TOKENS", 2)
    found = {"2wiki-triples": [edges.Asked(get("2wiki-triples"), item) for item in read(
        get("2wiki-triples"), written(tmp_path / "a.jsonl", EVIDENCE)).items if item.links]}  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    whole = edges.run(tiny, found, rows)
    assert len(whole) == len(found["2wiki-triples"]) * len(edges.WAYS)
    content = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(content[:3]) + content[3][:20])  # killed while it wrote
    again = edges.run(tiny, found, rows)
    assert [(r["way"], round(r["nats"], 4)) for r in again] == [(r["way"], round(r["nats"], 4)) for r in whole]
    lines = edges.table(again)
    assert [line["way"] for line in lines] == [*edges.WAYS]
    by = {line["way"]: line for line in lines}
    # The one reader is read by none, so its version alone is dropped for the one that reads.
    assert (
        len({by[way]["document tokens"] for way in ("block", "graph-kv none", "graph-kv true", "graph-kv random")}) == 1
    )
    assert all(line["items"] == len(found["2wiki-triples"]) and line["question tokens"] > 0 for line in lines)
    assert by["graph-kv random"]["against random"] == "" and by["graph-kv true"]["p"]
