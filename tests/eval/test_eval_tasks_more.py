"""Summaries, needles, long documents, citation graphs and topics: from raw records to plans.

Real samples are looked for in ../shared/data beside the repository, or where KVGRAPH_DATA says. For data sets without a
sample there, the tests write small files in the public schema.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kvgraph.data import prompt
from kvgraph.data.items import read
from kvgraph.data.task import Item, Task, TaskError
from kvgraph.data.tasks.arxiv_qa import ARXIV_QA
from kvgraph.data.tasks.longbench_v2 import LONGBENCH_V2
from kvgraph.data.tasks.multi_news import MULTI_NEWS
from kvgraph.data.tasks.ruler import RULER
from kvgraph.data.tasks.samsum import SAMSUM
from kvgraph.data.tasks.scisumm import SCISUMM
from kvgraph.data.tasks.segments import segments
from kvgraph.data.tasks.topics import TOPICS
from kvgraph.data.tasks.unarxive import MARKER, UNARXIVE
from kvgraph.data.tasks.xsum import XSUM
from kvgraph.graph import ContextGraph
from kvgraph.methods import METHODS, GraphKV, Method

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
TASKS = (XSUM, SAMSUM, MULTI_NEWS, RULER, LONGBENCH_V2, ARXIV_QA, SCISUMM, UNARXIVE, TOPICS)
SAMPLES = {  # (task, path): (items, documents of all items together)
    (XSUM, "xsum/xsum_0shot_300.jsonl.gz"): (300, 2098),
    (MULTI_NEWS, "multi_news/multi_news_100.jsonl.gz"): (100, 294),
    (RULER, "ruler/ruler_4096_niah_multikey_3_50.jsonl.gz"): (50, 350),
    (SCISUMM, "scisumm"): (200, 6864),
    (UNARXIVE, "unarxive/arXiv_src_2212_086.jsonl.gz"): (200, 18271),
    (TOPICS, "webkb/webkb_Cornell.jsonl.gz"): (191, 410),
    (TOPICS, "webkb/webkb_Texas.jsonl.gz"): (187, 413),
    (TOPICS, "webkb/webkb_Washington.jsonl.gz"): (229, 521),
    (TOPICS, "webkb/webkb_Wisconsin.jsonl.gz"): (265, 673),
}


def sample(task: Task, path: str | None = None) -> tuple[Item, ...]:
    """The items of a real sample, the task's first one unless a path is given."""
    path = path or next(path for known, path in SAMPLES if known is task)
    if not (DATA / path).exists():
        pytest.skip(f"no real input: {DATA / path} is missing; set KVGRAPH_DATA to the folder that has it")
    return read(task, DATA / path).items


def written(tmp_path: Path, *rows: object) -> Path:
    """A file of JSON Lines."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(item: Item) -> str:
    """The item's documents one after the other."""
    return "".join(document.text for document in item.documents)


DIALOGUE = {
    "id": "13800001",
    "summary": "Ola brings the tent and Max the stove.",
    "dialogue": "Ola: I have a tent\r\nMax: Then I bring the stove\r\nOla: \U0001f44d\r\n" + "Max: ok\r\n" * 60,
}
LONG = {
    "_id": "66ebc0000000000000000000",
    "domain": "Single-Document QA",
    "sub_domain": "Detective",
    "difficulty": "hard",
    "length": "short",
    "question": "Who took the ring?",
    "choice_A": "the cook",
    "choice_B": "the gardener",
    "choice_C": "nobody {sic}",
    "choice_D": "the magpie",
    "answer": "D",
    "context": "The ring lay by the window. A bird sang.\n" * 300,
}


@pytest.fixture
def small(tmp_path) -> dict[str, Path]:
    """Data for the tasks that have no sample: {task name: path}."""
    folder = tmp_path / "arxiv"
    for name in ("text_data", "questions", "answers"):
        (folder / name).mkdir(parents=True)
    for i in (10, 1, 2, 3):
        cited = {f"cited {i}a": f"We count {i} kinds of snow.", f"cited {i}b": None, f"cited {i}c": f"Ice {i} is cold."}
        papers = {f"paper {i}": {"0": f"Following earlier work, we melt {i} flakes.", "1": cited}}
        (folder / "text_data" / f"{i}.json").write_text(json.dumps(papers), encoding="utf-8")
        (folder / "questions" / f"{i}.txt").write_text("How many kinds of snow are there?\n", encoding="utf-8")
        (folder / "answers" / f"{i}.txt").write_text(f"{i}\n", encoding="utf-8")
    for name, row in (("samsum", DIALOGUE), ("longbench-v2", LONG)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, row)
    return {"arxiv-qa": folder, "samsum": tmp_path / "samsum", "longbench-v2": tmp_path / "longbench-v2"}


# -- every sample, every task, every method ---------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "path"), SAMPLES, ids=lambda value: getattr(value, "name", Path(str(value)).name))
def test_a_real_sample_is_read_completely(task, path):
    items = sample(task, path)
    assert (len(items), sum(len(item.documents) for item in items)) == SAMPLES[task, path]
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert all(gold.strip() for gold in item.references) and item.references
        ids = [document.id for document in item.documents]
        assert all(ids) and len(set(ids)) == len(ids), item.id
        assert all(0 <= source < reader < len(ids) for source, reader in item.links), item.id
        assert all(b == "kind" or b in item.facts for b in task.breakdowns), item.id


def graph_of(task: Task, item: Item, method: Method) -> ContextGraph:
    """The item's graph in bytes, for a model without a chat template."""
    edges = prompt.edges_of(item, task.edges) if isinstance(method, GraphKV) else ()
    filled = [document.filled(task.document) for document in item.documents]
    graph = ContextGraph(filled, task.question.format(question=item.question), task.instruction, edges)
    return graph.tokenized(lambda text: list(text.encode()))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_items_plan_under_every_method(task, small):
    items = read(task, small[task.name]).items if task.name in small else sample(task)
    for item in items[:6]:
        short = replace(item, documents=tuple(replace(d, text=d.text[:60]) for d in item.documents))
        for make in METHODS.values():
            method = make()
            if method.needs_probe:
                method = method.selecting(())  # what the engine does for a graph that nobody looked at
            plan = method.plan(graph_of(task, short, method))
            assert bytes(plan.prompt.tokens).decode().endswith(task.question.format(question=item.question))
            assert len(plan.spans) > len(item.documents)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_no_document_says_its_rank(task):
    assert set(task.document.replace("{title}", "").replace("{text}", "")) <= {"\n"}


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 60, 1000])
def test_segments_are_the_text_again(size):
    text = (
        "First line.\n\nA line with two sentences! Is it longer than most? Yes.\r\nlast  \n没有空格。也是句子。"
        + "x" * 70
    )
    pieces = [document.text for document in segments(text, size)]
    assert "".join(pieces) == text and all(pieces)
    for piece in pieces[:-1]:
        assert piece.endswith(("\n", " ", "。")), piece
    for a, b in zip(pieces, pieces[1:], strict=False):
        assert len(a) + len(b) > size  # none could have been joined


def test_segments_stay_within_their_size():
    pieces = segments("One two three. " * 50 + "\n" + "four five six seven\n" * 50, 100)
    assert max(len(piece.text) for piece in pieces) <= 100 and len(pieces) > 15
    assert segments("", 100) == ()


# -- summaries --------------------------------------------------------------------------------------------------------


def test_xsum_is_freed_of_the_prompt_around_it():
    first = sample(XSUM)[0]
    assert text_of(first).startswith("Officers searched properties in the Waterfront Park")
    assert text_of(first).endswith("appeared at Edinburgh Sheriff Court on Thursday.")
    assert first.references == (
        "A man has appeared in court after firearms, ammunition and cash were seized by police in Edinburgh.",
    )
    assert not any("Summarize the above" in text_of(item) or "###" in text_of(item) for item in sample(XSUM))


def test_xsum_reads_the_hub_table(tmp_path):
    row = {"document": "It rained.\n" * 100, "summary": "Rain.", "id": "35232142"}
    (item,) = read(XSUM, written(tmp_path, row)).items
    assert (item.id, item.references, len(item.documents)) == ("35232142", ("Rain.",), 3)
    assert text_of(item) == row["document"] and item.documents[0].text == "It rained.\n" * 36


def test_samsum_is_cut_between_utterances(small):
    (item,) = read(SAMSUM, small["samsum"]).items
    assert item.id == "13800001" and item.references == ("Ola brings the tent and Max the stove.",)
    assert text_of(item) == DIALOGUE["dialogue"].replace("\r\n", "\n")
    assert len(item.documents) == 2 and item.documents[1].text.startswith("Max: ok\n")


def test_multi_news_has_a_document_an_article(tmp_path):
    first = sample(MULTI_NEWS)[0]
    assert first.facts == {"articles": len(first.documents)} and first.id.startswith("e45abfcb")
    assert first.documents[0].text.startswith("Members of Occupy Philadelphia remain")
    assert "(David M Warren / Staff Photographer)\n\nAbout 100" in first.documents[0].text
    assert not any("NEWLINE_CHAR" in text_of(item) or "Passage 1:" in text_of(item) for item in sample(MULTI_NEWS))
    row = {"document": " One storm. \n |||||Two\nstorms.||||| ", "summary": "– Storms."}
    (item,) = read(MULTI_NEWS, written(tmp_path, row)).items
    assert [document.text for document in item.documents] == ["One storm.", "Two\nstorms."]
    assert item.references == ("– Storms.",)


# -- long documents ---------------------------------------------------------------------------------------------------


def test_ruler_finds_the_needle_it_asks_for():
    first = sample(RULER)[0]
    key, value = "0222305d-f1f7-4605-a79e-36267707ac0e", "457498ca-a90e-419d-a37e-3f94110c8d92"
    assert first.references == (value,) and first.question.startswith(f"What is the special magic uuid for {key} ")
    assert first.question.endswith(f"The special magic uuid for {key} mentioned in the provided text is")
    (holder,) = [i for i, document in enumerate(first.documents) if value in document.text]
    assert f"One of the special magic uuids for {key} is: {value}.\n" in first.documents[holder].text
    assert first.facts["gold_position"] == holder and first.facts["length"] == 4096 and first.kind == "uuid"
    for item in sample(RULER):
        assert "quiz you" not in text_of(item) and text_of(item).count("One of the special magic uuids for") == 51
        assert text_of(item).count("\n") == 50


def test_ruler_cuts_no_needle_of_an_essay(tmp_path):
    needles = [f"One of the special magic numbers for key-{i} is: {i * 1111111}." for i in range(1, 9)]
    essay = " ".join(f"{'Writing is rewriting, as they say. ' * (7 * i)}{n}" for i, n in enumerate(needles, 1))
    intro = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
    )
    table = {
        "context": f"{intro}about the numbers afterwards.\n{essay}\n",
        "question": "What are all the special magic numbers for key-8 and key-2 mentioned in the provided text?\n",
        "answer_prefix": " The special magic numbers for key-8 and key-2 mentioned in the provided text are",
        "answer": ["8888888", "2222222"],
        "task": "niah_multiquery",
        "max_new_tokens": "128",
    }
    other = table | {"task": "qa_1", "answer": ["not in the text"]}
    (item,) = read(RULER, written(tmp_path, table, other)).items
    assert len(item.documents) > 5 and text_of(item).strip() == essay
    for needle in needles:
        assert sum(needle in document.text for document in item.documents) == 1
    assert item.references == ("8888888", "2222222") and item.kind == "niah_multiquery"
    assert item.facts == {"depth": 100, "gold_position": len(item.documents) - 1, "needles": 2}
    assert item.question.endswith("in the provided text? The special magic numbers for key-8 and key-2 mentioned in the "
                                  "provided text are")  # fmt: skip


def test_longbench_v2_asks_about_single_documents_only(tmp_path):
    path = written(tmp_path, LONG | {"_id": "a", "domain": "Multi-Document QA"}, LONG)
    (item,) = read(LONGBENCH_V2, path).items
    assert item.id == LONG["_id"] and item.references == ("D",) and item.kind == "Detective"
    assert item.question == ("Who took the ring?\n(A) the cook\n(B) the gardener\n(C) nobody {sic}\n(D) the magpie")
    assert text_of(item) == LONG["context"]
    assert [len(document.text) for document in item.documents] == [3977, 3977, 3977, 369]
    assert item.facts == {"difficulty": "hard", "length": "short", "segments": 4}


# -- citation graphs --------------------------------------------------------------------------------------------------


def test_arxiv_qa_reads_the_released_layout(small):
    items = read(ARXIV_QA, small["arxiv-qa"]).items
    assert [item.id for item in items[:6]] == [
        "1",
        "1/1-first",
        "1/1-last",
        "2/... "[:0] or "1/2-first",
        "1/2-last",
        "2",
    ]
    assert items[-1].id == "10/2-last" and len(items) == 20
    alone, first, last = items[0], items[3], items[4]
    assert [document.id for document in alone.documents] == ["1/cited 1a", "1/cited 1c", "1/paper 1"]  # 1b is null
    assert alone.links == ((0, 2), (1, 2)) and alone.references == ("1",)
    assert [document.id.split("/")[0] for document in first.documents] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert [document.id.split("/")[0] for document in last.documents] == ["2"] * 3 + ["3"] * 3 + ["1"] * 3
    assert first.links == ((0, 2), (1, 2), (3, 5), (4, 5), (6, 8), (7, 8)) == last.links
    assert (first.facts, last.facts) == (
        {"distractors": 2, "related": "first", "gold_positions": "0,1,2"},
        {"distractors": 2, "related": "last", "gold_positions": "6,7,8"},
    )
    assert [item.cluster for item in items] == [name for name in ("1", "2", "3", "10") for _ in range(5)]


@pytest.mark.parametrize("task", [SCISUMM, UNARXIVE], ids=lambda task: task.name)
def test_citation_graphs_come_in_five_arrangements(task):
    items = sample(task)
    counts = Counter((item.facts["distractors"], item.facts["related"]) for item in items)
    assert counts == dict.fromkeys([(0, "alone"), (1, "first"), (1, "last"), (2, "first"), (2, "last")], 40)
    for alone, *others in zip(*[iter(items)] * 5, strict=True):
        size = len(alone.documents)
        for item in others:
            assert (item.question, item.references) == (alone.question, alone.references)
            first = item.facts["related"] == "first"
            assert (item.documents[:size] if first else item.documents[-size:]) == alone.documents
            distractors = item.documents[size:] if first else item.documents[:-size]
            assert not {d.text for d in distractors} & {d.text for d in alone.documents}
            assert item.references[0] not in {d.title for d in distractors}
            at = 0 if first else len(distractors)
            assert {(at + s, at + r) for s, r in alone.links} <= set(item.links)


def test_scisumm_asks_what_a_sentence_cites():
    first = sample(SCISUMM)[0]
    title = "Word Re-ordering and DP-based Search in Statistical Machine Translation"
    assert first.references == (title,) and first.documents[0].title == title and first.kind == "method"
    assert first.question.startswith('The paper C02-1050 says: "Under this constraint, many researchers had ')
    assert first.question.endswith('the paper that it cites there as "2000"?')
    assert [document.id for document in first.documents[:3]] == ["C00-2123", "C02-1050", "C04-1091"]
    assert first.links == tuple((0, i) for i in range(1, 17))  # all sixteen read the paper that they cite
    assert "Introduction\nThe goal of machine translation is the translation" in first.documents[0].text
    edges = sum(len(item.links) for item in sample(SCISUMM) if item.facts["related"] == "alone")
    assert edges == 584


def test_unarxive_asks_where_a_work_is_cited():
    items = [item for item in sample(UNARXIVE) if item.facts["related"] == "alone"]
    assert sum(len(item.links) for item in items) == 1621
    title = "Zeros of a growing number of derivatives of random polynomials with independent roots"
    *cited, paper = items[0].documents
    assert paper.title == title and paper.id == "2212.11867" and len(cited) == 12
    assert items[0].links == tuple((i, 12) for i in range(12))
    assert cited[0].title == f'Reference [1] of "{title}"' and cited[0].text.startswith("R. Pemantle and I. Rivin.")
    assert "Pemantle and Rivin [1] conjectured that the same holds" in paper.text
    for item in items:
        assert not MARKER.search(text_of(item) + item.question + item.references[0])
        work = item.question.partition(" cite this work: ")[2]
        number = next(i for i, d in enumerate(item.documents, 1) if d.text.strip() == work)
        before, marker, _ = item.documents[-1].text.partition(f"[{number}]")
        assert marker and f"\n\n{item.references[0]}\n\n" in f"\n\n{before}", (
            item.id
        )  # the heading stands before the marker
    assert max(Counter(item.references[0] for item in items).values()) <= 0.3 * len(items)


def test_a_group_that_shares_a_paper_is_no_distractor(tmp_path):
    def paper(name: str) -> dict:
        return {"paper_id": name, "title": "", "abstract": f"About {name}.", "sections": []}

    note = {
        "Citing Article": "B.xml",
        "Citation Marker": "A, 1999",
        "Citation Text": '<S sid ="1">As A &amp; B did</S><S sid ="2">before.</S>',
        "Discourse Facet": "['Aim_Citation','Method_Citation']",
    }
    egos = [("A", ["B", "C"]), ("D", ["C"]), ("E", ["F"]), ("G", ["H"])]
    for name, rows in (
        ("papers", [paper(name) for name in "ABCDEFGH"]),
        ("egos", [{"reference_paper": r, "citing_papers": c, "annotations": [note]} for r, c in egos]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    items = {item.id: item for item in read(SCISUMM, tmp_path).items}
    assert [document.id for document in items["A/2-last"].documents] == [*"EFGHABC"]
    assert [document.id for document in items["E/2-last"].documents] == [*"GHABCEF"]
    assert [document.id for document in items["G/2-last"].documents] == [*"ABCEFGH"]  # D shares C with A
    assert items["A"].question.startswith('The paper B says: "As A & B did before." ')
    assert items["A"].references == ("A",) and items["A"].kind == "method"
    assert read(SCISUMM, tmp_path, limit=6).items[-1].id == "D"


# -- topics -----------------------------------------------------------------------------------------------------------


def test_a_page_reads_the_pages_it_links_to():
    items = sample(TOPICS)
    first = items[0]
    assert [document.id for document in first.documents] == ["166", "0"] and first.links == ((0, 1),)
    assert first.references == ("student",) == (first.kind,) and first.documents[1].text.startswith("Patty Hough;")
    assert "Categories: course, faculty, project, staff, student" in first.question
    assert first.question.startswith('Which of these categories is right for the text that begins "Patty Hough;')
    assert {item.facts["neighbours"] for item in items} >= {0, 1, 2}
    assert all(item.facts["gold_positions"] == str(item.facts["neighbours"]) for item in items)
    assert not any(item.documents[-1].id in {d.id for d in item.documents[:-1]} for item in items)


def test_topics_reads_csv_tables(tmp_path):
    path = tmp_path / "Cora.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["node_id", "label", "category", "raw_text", "neighbor_ids"])
        table.writeheader()
        for i in range(30):
            row = {"node_id": i, "label": i % 2, "category": ("Theory", "Rule_Learning")[i % 2]}
            near = [n for n in range(30)] if i == 3 else []
            table.writerow(
                row | {"raw_text": f"Paper {i}:\nwith, commas " + "long " * 40_000 * (i == 5), "neighbor_ids": near}
            )
    items = read(TOPICS, path).items
    assert len(items) == 30 and items[5].documents[0].text.endswith("long ")
    assert [document.id for document in items[3].documents] == [*map(str, [0, 1, 2, *range(4, 21)]), "3"]
    assert items[3].facts == {"neighbours": 20, "gold_positions": "20"} and items[3].references == ("Rule_Learning",)


# -- errors -----------------------------------------------------------------------------------------------------------

NODE = {"node_id": "0", "raw_text": "a", "category": "x", "neighbor_ids": "[]"}
NEEDLE = {"index": 1, "input": "I will quiz you.\nThe key is 7.\nWhat is it?", "outputs": ["8"], "length": 20}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            XSUM,
            [{"document": "a", "summary": "b"}, {"text": "a", "summary": "b"}],
            ":2: record 2: document: Field required",
        ),
        (XSUM, [{"document": "a", "summary": " "}], "record 1: summary: .*there is no answer"),
        (SAMSUM, [DIALOGUE | {"dialogue": " "}], "record '13800001': dialogue: "),
        (MULTI_NEWS, [{"_id": "e1", "context": "Passage 1:\na"}], "record 'e1': summary: Field required"),
        (RULER, [NEEDLE], "the output '8' isn't in the haystack"),
        (RULER, [{"question": "What?", "answer": ["8"]}], "context: Field required"),
        (LONGBENCH_V2, [LONG | {"answer": "E"}], "record '66ebc0+': answer: Input should be 'A'"),
        (TOPICS, [NODE, NODE], "node_id 0 occurs twice"),
        (TOPICS, [NODE | {"neighbor_ids": "[4]"}], "node_id 0: neighbor_ids names 4"),
        (TOPICS, [NODE | {"neighbor_ids": "4]"}], "record 1: neighbor_ids: Extra data"),
        (UNARXIVE, [{"paper_id": "1", "metadata": {}}], "metadata.title: Field required"),
    ],
)
def test_a_record_of_another_schema_is_named(task, rows, message, tmp_path):
    with pytest.raises(TaskError, match=message) as error:
        read(task, written(tmp_path, *rows))
    assert "data.jsonl" in str(error.value) or task is TOPICS  # a wrong graph isn't one record's fault


def test_a_folder_of_another_layout_is_named(small, tmp_path):
    folder = small["arxiv-qa"]
    (folder / "answers" / "2.txt").unlink()
    with pytest.raises(TaskError, match=r"can't read .*answers/2.txt: No such file"):
        read(ARXIV_QA, folder)
    with pytest.raises(TaskError, match="has no text_data/ID.json; give the folder"):
        read(ARXIV_QA, tmp_path)
    with pytest.raises(TaskError, match=r"has no papers.jsonl or papers.jsonl.gz; give the folder"):
        read(SCISUMM, tmp_path)
    (tmp_path / "papers.jsonl").write_text('{"paper_id": "A"}\n[]\n', encoding="utf-8")
    (tmp_path / "egos.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(TaskError, match=r"papers.jsonl:2 holds a list; every record must be a JSON object"):
        read(SCISUMM, tmp_path)
    (tmp_path / "papers.jsonl").write_text('{"paper_id": "A"}\n', encoding="utf-8")
    (tmp_path / "egos.jsonl").write_text('{"reference_paper": "A", "citing_papers": ["B"]}\n', encoding="utf-8")
    with pytest.raises(TaskError, match=r"egos.jsonl:1: there is no field or paper 'B'"):
        read(SCISUMM, tmp_path)
