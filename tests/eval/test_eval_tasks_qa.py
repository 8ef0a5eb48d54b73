"""Question-answering tasks: real samples parse completely, hand-checked items, every method plans them, errors.

The samples are looked for in ../shared/data beside the repository, or where KVGRAPH_DATA says. Tasks without a sample
are read from small files in the exact public schema.
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvgraph import methods
from kvgraph.data import prompt
from kvgraph.data.items import read
from kvgraph.data.task import Item, Task, TaskError
from kvgraph.data.tasks import TASKS, get, triviaqa
from kvgraph.demo import write_model
from kvgraph.engine.engine import Engine
from kvgraph.eval.metrics import EXTRACT, METRICS
from kvgraph.eval.run import evaluate
from soak import SOAK

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
QA = (
    ["nq", "nq-positions", "triviaqa", "hotpotqa", "2wiki", "musique", "multihop-rag", "morehopqa"]
    + ["block-nq", "block-triviaqa", "block-hotpotqa", "block-2wiki"]
)  # fmt: skip

SAMPLES = {
    "nq": ("nq", 1323),
    "nq-positions": ("nq/nq-open-10_total_documents_gold_at_4.jsonl.gz", 4410),
    "hotpotqa": ("hotpotqa/hotpot_train_100.jsonl.gz", 100),
    "2wiki": ("2wikimultihopqa/2wiki_train_500.jsonl.gz", 500),
    "musique": ("musique/musique_train_100.jsonl.gz", 100),
    "morehopqa": ("morehopqa/morehopqa_final_150samples.jsonl.gz", 150),
    "triviaqa": ("triviaqa/triviaqa-sample.tgz", 4),
}

NEWS = {
    "Bridge reopens after repairs": (
        "https://a.example/bridge",
        "The Harrow bridge reopened on Monday.",
        "The Courier",
    ),
    "Mayor explains delays": ("https://b.example/mayor", "Mayor Odell blamed the rain for the delay.", "Daily Ledger"),
    "Ferry company cuts fares": ("https://c.example/ferry", "Fares fall by a tenth in May.", "The Courier"),
}


def evidence(title: str) -> dict[str, str]:
    url, fact, source = NEWS[title]
    return {
        "title": title,
        "author": "A. Writer",
        "url": url,
        "source": source,
        "category": "news",
        "published_at": "2023-11-06T08:00:00+00:00",
        "fact": fact,
    }


MULTIHOP = [
    {
        "query": "Who blamed the weather for the delay of the bridge that reopened on Monday?",
        "answer": "Odell",
        "question_type": "inference_query",
        "evidence_list": [evidence("Bridge reopens after repairs"), evidence("Mayor explains delays")],
    },
    {
        "query": "Did The Courier report on the bridge before Daily Ledger reported on the tunnel?",
        "answer": "Insufficient information.",
        "question_type": "null_query",
        "evidence_list": [],
    },
]
CORPUS = [
    {
        "title": title,
        "author": "A. Writer",
        "source": source,
        "published_at": "2023-11-06T08:00:00+00:00",
        "category": "news",
        "url": url,
        "body": f"Some words first. {fact} Some words after.",
    }
    for title, (url, fact, source) in NEWS.items()
]
RETRIEVED = {
    "query": MULTIHOP[0]["query"],
    "answer": "Odell",
    "question_type": "inference_query",
    "retrieval_list": [
        {"text": "[Excerpt from document]\ntitle: Ferry company cuts fares\nExcerpt:\nFares fall.", "score": 0.41},
        {"text": "[Excerpt from document]\ntitle: Mayor explains delays\nExcerpt:\nMayor Odell\nblamed the rain "
         "for the delay.", "score": 0.73},
    ],
    "gold_list": MULTIHOP[0]["evidence_list"],
}  # fmt: skip
BLOCK = {
    "prompt": "",
    "question": "Which river runs through Harrow?",
    "answers": [["the Wend", "River Wend"]],
    "generated": "",
    "inputs": {"input_ids": [], "labels": []},
    "documents": [
        {"title": "Oldham", "text": "Oldham has no river.", "score": 0.2},
        {"title": "Harrow", "text": "The Wend runs through Harrow.", "score": 1.5},
        {"title": "Rivers", "text": "Rivers run downhill.", "score": 0.7},
    ],
}


def sample(name: str) -> Path:
    path = DATA / SAMPLES[name][0]
    if not path.exists():
        pytest.skip(f"no real input: {path} is missing; set KVGRAPH_DATA to the folder that has it")
    return path


def items_of(name: str, source: Path, limit: int | None = None) -> tuple[Item, ...]:
    return read(get(name), source, limit).items


def one(task: str, *raw: dict) -> Item:
    (item,) = get(task).items(raw)
    return item


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def first_record(name: str) -> dict:
    return json.loads(gzip.open(sample(name), "rt", encoding="utf-8", newline="\n").readline())


class ByteTokenizer:
    """A token a byte, no chat template, no BOS."""

    chat_template = None
    bos_token_id = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(text.encode()))


def planned_by_all_methods(task: Task, items: tuple[Item, ...]) -> None:
    """Every method plans every item; the query and every document that holds anything is in the plan."""
    tokenizer = ByteTokenizer()
    for item in items:
        made = prompt.build(task, item, tokenizer)
        for name in methods.METHODS:
            method = methods.get(name)
            edges = prompt.edges_of(item, task.edges) if method.reads_edges else ()
            graph = made.graph(edges).tokenized(lambda text: list(text.encode()))
            if getattr(method, "needs_probe", False):
                method = method.selecting([[float(i) for i in range(len(s))] for s in graph.segments])
            plan = method.plan(graph)
            shown = Counter(span.tokens for span in plan.spans)
            assert all(segment in shown for segment in graph.segments), (name, item.id)
            assert plan.spans[-1].tokens[-len(graph.query) :] == graph.query, (name, item.id)


# -- all tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QA)
def test_a_task_names_what_exists_and_never_ranks_documents(name):
    task = get(name)
    assert task.name == name and task.about and task.source
    assert task.metrics and set(task.metrics) <= set(METRICS) and task.extract in EXTRACT
    assert "{question}" in task.question and task.instruction == task.instruction.strip()
    assert task.document == "{title}\n{text}\n\n"


def test_an_unknown_task_is_an_error_that_lists_all():
    with pytest.raises(TaskError, match="there is no task 'hotpot'; there are nq, .*block-2wiki"):
        get("hotpot")
    with pytest.raises(TypeError):
        TASKS["mine"] = get("nq")  # type: ignore[index]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_real_sample_parses_completely_and_every_method_plans_it(name):
    task, items = get(name), items_of(name, sample(name))
    assert len(items) == SAMPLES[name][1]
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert item.question.strip() and item.references and all(gold.strip() for gold in item.references)
        assert item.documents and all(document.text.strip() for document in item.documents)
        gold = [int(i) for i in str(item.facts["gold_positions"]).split(",") if i]
        assert len(gold) + item.facts["distractors"] == len(item.documents)
        assert set(gold) <= set(range(len(item.documents)))
        assert all(key in item.facts for key in task.breakdowns if key != "kind")
        assert item.kind or "kind" not in task.breakdowns
    planned_by_all_methods(task, items[:: max(1, len(items) // (500 if SOAK else 3))])


# -- Natural Questions ------------------------------------------------------------------------------------------------


def test_nq_has_the_gold_passage_where_the_file_says():
    items = items_of("nq", sample("nq"))
    assert Counter(item.facts["gold_position"] for item in items) == {0: 441, 4: 441, 9: 441}
    item = next(i for i in items if i.facts["gold_position"] == 4)
    assert item.question == "who got the first nobel prize in physics"
    assert item.references == ("Wilhelm Conrad Röntgen",)
    assert item.id.endswith("@4") and item.kind == ""
    assert item.facts == {"gold_position": 4, "gold_positions": "4", "distractors": 9}
    assert [d.title for d in item.documents][:5] == [
        "Asian Americans in science and technology",
        "Scientist",
        "Norwegian Americans",
        "Maria Goeppert Mayer",
        "List of Nobel laureates in Physics",
    ]
    assert item.documents[0].id == "20769157" and item.documents[4].id == "gold"


def test_nq_ids_are_the_same_whichever_files_are_read():
    folder = sample("nq")
    alone = items_of("nq", folder / "nq-open-10_total_documents_gold_at_9.jsonl.gz")
    together = {item.id: item for item in items_of("nq", folder)}
    assert all(together[item.id] == item for item in alone)


@pytest.mark.parametrize("given", [0, 4, 9])
def test_nq_positions_derives_what_the_other_files_hold(given):
    folder = sample("nq")
    derived = {
        i.id: i for i in items_of("nq-positions", folder / f"nq-open-10_total_documents_gold_at_{given}.jsonl.gz")
    }
    assert Counter(item.facts["gold_position"] for item in derived.values()) == {p: 441 for p in range(10)}
    assert all(derived[item.id] == item for item in items_of("nq", folder))


def test_nq_positions_of_two_files_is_an_error():
    with pytest.raises(TaskError, match="is at 4 here and at 0 before; give only one gold_at_K file"):
        items_of("nq-positions", sample("nq"))


# -- multi-hop over given paragraphs ----------------------------------------------------------------------------------


def test_a_hotpotqa_item():
    items = items_of("hotpotqa", sample("hotpotqa"))
    assert Counter(item.kind for item in items) == {"bridge": 78, "comparison": 22}
    item = next(item for item in items if len(item.documents) == 4)
    assert item.id == "5ac2a291554299657fa28ff6"
    assert item.question == "Are Nantong and Jingdezhen situated in the same province ?"
    assert item.references == ("no",)
    titles = ["Taizhou, Jiangsu", "Nantong", "Jingdezhen", "Jingdezhen Ceramic Institute"]
    assert [d.title for d in item.documents] == titles
    assert item.documents[0].text == (
        "Taizhou () is a prefecture-level city in central Jiangsu Province in eastern China. Situated on the north bank "
        "of the Yangtze River, it borders Nantong to the east, Yancheng to the north and Yangzhou to the west."
    )
    assert item.facts == {"hops": 2, "level": "medium", "gold_positions": "1,2", "distractors": 2}


def test_hotpotqa_reads_the_hubs_columns_too():
    raw = first_record("hotpotqa")
    titles, sentences = zip(*raw["context"], strict=True)
    facts = dict(zip(("title", "sent_id"), map(list, zip(*raw["supporting_facts"], strict=True)), strict=True))
    columns = {"id": raw["_id"], "context": {"title": list(titles), "sentences": list(sentences)}}
    rest = {key: raw[key] for key in ("question", "answer", "type", "level")}
    assert one("hotpotqa", {**rest, **columns, "supporting_facts": facts}) == one("hotpotqa", raw)


def test_a_2wiki_item():
    items = items_of("2wiki", sample("2wiki"))
    kinds = {"compositional": 227, "comparison": 162, "bridge_comparison": 92, "inference": 19}
    assert Counter(item.kind for item in items) == kinds
    item = next(item for item in items if item.kind == "bridge_comparison")
    assert item.id == "58f39f7808b511ebbd88ac1f6bf848b6"
    assert item.references == ("The Prairie King",)
    assert item.facts == {"hops": 4, "gold_positions": "0,2,7,8", "distractors": 6}
    assert "produced and directed by Albert Zugsmith. It is loosely based" in item.documents[0].text


def test_2wiki_reads_the_hubs_json_text_too():
    raw = first_record("2wiki")
    text = {key: json.dumps(raw[key]) for key in ("context", "supporting_facts")}
    assert one("2wiki", raw | text) == one("2wiki", raw)


@pytest.mark.parametrize("context", [None, [], "absent"])
def test_2wiki_refuses_records_without_context(context):
    raw = first_record("2wiki") | {"context": context}
    if context == "absent":
        del raw["context"]
    with pytest.raises(TaskError, match=r"record '93402dbc0bdb11eba7f7acde48001122': context: "):
        one("2wiki", raw)


def test_a_musique_item():
    items = items_of("musique", sample("musique"))
    assert Counter(item.facts["hops"] for item in items) == {2: 68, 3: 27, 4: 5}
    assert Counter(item.kind for item in items) == {"2hop": 68, "3hop1": 24, "3hop2": 3, "4hop1": 3, "4hop3": 2}
    assert items[0].references == ("G. Stanley Hall", "Stanley Hall")
    item = next(item for item in items if item.kind == "4hop1")
    assert item.id == "4hop1__709382_146811_31223_91015"
    assert item.references == ("35",)
    assert item.facts == {"hops": 4, "gold_positions": "6,14,15,16", "distractors": 16}
    assert [item.documents[i].title for i in (6, 14, 15, 16)] == [
        "Tennessee",
        "Hank Snow",
        "Hello Love (song)",
        "Publix",
    ]


def test_musique_refuses_unanswerable_questions():
    with pytest.raises(TaskError, match="record '2hop__150763_14904': answerable: "):
        one("musique", first_record("musique") | {"answerable": False})


def test_a_morehopqa_item():
    task, items = get("morehopqa"), items_of("morehopqa", sample("morehopqa"))
    assert Counter(item.facts["hops"] for item in items) == {1: 58, 2: 49, 3: 26, 5: 15, 4: 2}
    assert not any("Symbolic, " in item.kind for item in items)  # one spelling for each set of reasoning types
    item = next(item for item in items if item.id == "895740ae0bb011ebab90acde48001122_9")
    assert item.kind == "Arithmetic, Commonsense, Symbolic"
    assert item.references == ("3",)
    assert item.facts == {"hops": 3, "answer_type": "number", "gold_positions": "0,1", "distractors": 0}
    assert item.documents[1].text.endswith("entertainment of Elizabeth I at Basing House.")
    answer = EXTRACT[task.extract]("Her name was Elizabeth.\nAnswer: 3")
    assert METRICS[task.metrics[0]](answer, item.references) == 1


# -- TriviaQA ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trivia(tmp_path_factory) -> Path:
    """The real sample, unpacked."""
    folder = tmp_path_factory.mktemp("triviaqa")
    with tarfile.open(sample("triviaqa")) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_triviaqa_item(trivia):
    items = {item.id: item for item in items_of("triviaqa", trivia)}
    assert list(items) == ["web-tc_2", "web-tc_33", "wikipedia-tc_33", "wikipedia-tc_40"]
    item = items["web-tc_33"]
    assert item.question == "Which Lloyd Webber musical premiered in the US on 10th December 1993?"
    assert item.references == (
        "Sunset Boulevard",
        "Sunset Blvd",
        "West Sunset Boulevard",
        "Sunset Bulevard",
        "Sunset Blvd.",
    )
    assert [d.id for d in item.documents] == ["Andrew_Lloyd_Webber.txt", "35/35_995.txt", "46/46_996.txt"]
    assert item.kind == "web" and item.facts["distractors"] == 3
    page = (trivia / "evidence/web/46/46_996.txt").read_text(encoding="utf-8")
    assert item.documents[2].text.split() == page.split()[:800]
    assert page.startswith(item.documents[2].text) and item.documents[2].text.count("\n") > 10
    assert items["web-tc_2"].facts == {"answer_shown": "yes", "gold_positions": "0,1", "distractors": 0}


def test_triviaqa_reads_an_archive_as_it_reads_its_folder(trivia):
    assert items_of("triviaqa", trivia) == items_of("triviaqa", sample("triviaqa"))


@pytest.mark.parametrize(
    ("name", "count"), [("web-dev", 2), ("web-train", 3), ("wikipedia-dev", 2), ("wikipedia-train", 4)]
)
def test_triviaqa_reads_any_one_file(trivia, name, count):
    items = items_of("triviaqa", trivia / "qa" / f"{name}.json")
    assert len(items) == count and {item.kind for item in items} == {name.split("-")[0]}
    planned_by_all_methods(get("triviaqa"), items[:1])


def test_triviaqa_reads_the_original_sample_file_where_its_evidence_is(trivia):
    lone = DATA / "triviaqa" / "triviaqa_sample.json"
    with pytest.raises(
        TaskError, match="has no evidence/wikipedia/Andrew_Lloyd_Webber.txt, which question tc_33 needs"
    ):
        items_of("triviaqa", lone)
    beside = trivia / "qa" / "sample.json"
    beside.write_bytes(lone.read_bytes())
    (item,) = items_of("triviaqa", beside)
    beside.unlink()
    assert item.id == "web-tc_33" and len(item.documents) == 2


def test_triviaqa_leaves_out_the_verified_part_of_the_dev_files(tmp_path):
    page = {"Filename": "A.txt", "Title": "A"}
    question = {
        "Question": "Who?",
        "QuestionId": "tc_1",
        "Answer": {"Value": "A", "Aliases": []},
        "EntityPages": [page],
    }
    for name in ("wikipedia-dev", "verified-wikipedia-dev", "wikipedia-train"):
        write_json(tmp_path / "qa" / f"{name}.json", {"Domain": "Wikipedia", "Data": [question]})
    (tmp_path / "evidence/wikipedia").mkdir(parents=True)
    (tmp_path / "evidence/wikipedia/A.txt").write_text("A is.")
    assert [item.id for item in items_of("triviaqa", tmp_path)] == ["wikipedia-tc_1"]
    del question["Answer"]
    write_json(tmp_path / "qa/wikipedia-dev.json", {"Domain": "Wikipedia", "Data": [question]})
    with pytest.raises(TaskError, match=r"wikipedia-dev.json: record 1: Data.0.Answer: Field required"):
        items_of("triviaqa", tmp_path)


def test_triviaqa_reads_the_hubs_table():
    raw = {
        "question": "Who?",
        "question_id": "tc_1",
        "question_source": "http://example.org/",
        "entity_pages": {"doc_source": ["TagMe"], "filename": ["A.txt"], "title": ["A"], "wiki_context": ["Ann did."]},
        "search_results": {
            key: [] for key in ("description", "filename", "rank", "title", "url", "search_context")
        },
        "answer": {"aliases": ["Ann", "Anne"], "normalized_aliases": ["ann", "anne"], "value": "Ann"},
    }  # fmt: skip
    item = one("triviaqa", raw)
    assert (item.id, item.kind, item.references) == ("wikipedia-tc_1", "wikipedia", ("Ann", "Anne"))
    assert [(d.title, d.text, d.id) for d in item.documents] == [("A", "Ann did.", "A.txt")]
    raw["entity_pages"]["title"] = []
    with pytest.raises(TaskError, match="record 'tc_1': entity_pages: "):
        one("triviaqa", raw)


@pytest.mark.parametrize("keep", [0, 100, 150_000])  # bytes
def test_a_damaged_triviaqa_archive_is_an_error(tmp_path, keep):
    damaged = tmp_path / "a.tgz"
    damaged.write_bytes(sample("triviaqa").read_bytes()[:keep])
    with pytest.raises(TaskError, match="can't read .*a.tgz"):
        items_of("triviaqa", damaged)


def test_a_triviaqa_page_is_cut_after_whole_words():
    text = "\n one  two\n" + "w " * triviaqa.WORDS
    kept = get("triviaqa").items(
        [
            {
                "question": "Who?",
                "question_id": "1",
                "answer": {"value": "w"},
                "entity_pages": {"filename": ["a"], "title": ["A"], "wiki_context": [text]},
            }
        ]
    )
    (item,) = kept
    assert item.documents[0].text == "one  two\n" + "w " * (triviaqa.WORDS - 3) + "w"


# -- MultiHop-RAG -----------------------------------------------------------------------------------------------------


def test_multihop_rag_alone_reads_the_evidence_sentences(tmp_path):
    items = items_of("multihop-rag", write_json(tmp_path / "MultiHopRAG.json", MULTIHOP))
    assert [item.kind for item in items] == ["inference_query", "null_query"]
    assert items[0].references == ("Odell",) and items[1].references == ("Insufficient information.",)
    assert [(d.title, d.text) for d in items[0].documents] == [
        ("Bridge reopens after repairs", "The Harrow bridge reopened on Monday."),
        ("Mayor explains delays", "Mayor Odell blamed the rain for the delay."),
    ]
    assert items[0].facts == {"hops": 2, "gold_positions": "0,1", "distractors": 0}
    assert items[1].documents == () and items[1].facts == {"hops": 0, "gold_positions": "", "distractors": 0}
    planned_by_all_methods(get("multihop-rag"), items)


def test_multihop_rag_with_its_corpus_reads_whole_articles(tmp_path):
    again = MULTIHOP[0] | {"query": "Which bridge reopened?"}
    again["evidence_list"] = [evidence("Bridge reopens after repairs")] * 2  # two sentences of one article
    write_json(tmp_path / "MultiHopRAG.json", [*MULTIHOP, again])
    write_json(tmp_path / "corpus.json", CORPUS)
    items = items_of("multihop-rag", tmp_path)
    assert [len(item.documents) for item in items] == [2, 0, 1]
    assert (
        items[0].documents[1].text == "Some words first. Mayor Odell blamed the rain for the delay. Some words after."
    )
    assert items[0].documents[1].id == "https://b.example/mayor"
    planned_by_all_methods(get("multihop-rag"), items)
    write_json(tmp_path / "corpus.json", CORPUS[1:])
    with pytest.raises(TaskError, match="corpus.json has no article 'https://a.example/bridge', which 'Who blamed"):
        items_of("multihop-rag", tmp_path)
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(TaskError, match="can't read .*corpus.json: No such file"):
        items_of("multihop-rag", tmp_path)


def test_multihop_rag_reads_retrieved_chunks_best_first(tmp_path):
    (item,) = items_of("multihop-rag", write_json(tmp_path / "bge_retrieval_test.json", [RETRIEVED]))
    assert ["Mayor" in d.text for d in item.documents] == [True, False]
    assert item.facts == {"hops": 2, "gold_positions": "0", "distractors": 1}
    planned_by_all_methods(get("multihop-rag"), (item,))


def test_multihop_rag_numbers_a_question_that_comes_twice():
    first, second = get("multihop-rag").items([MULTIHOP[0], MULTIHOP[0]])
    assert second.id == f"{first.id}-2"


# -- Block-Attention's processed format -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in QA if name.startswith("block-")])
def test_a_block_item(tmp_path, name):
    path = tmp_path / "dataset"  # as the public files are called, without a suffix
    path.write_text(json.dumps(BLOCK) + "\n" + json.dumps(BLOCK | {"question": "Which?"}) + "\n", encoding="utf-8")
    item, other = items_of(name, path)
    assert item.id != other.id
    assert [d.title for d in item.documents] == ["Harrow", "Rivers", "Oldham"]
    assert item.references == ("the Wend", "River Wend")
    planned_by_all_methods(get(name), (item,))
    assert prompt.edges_of(item, "layers:1-1") == ((0, 1), (1, 2))  # from the best down


# -- schemas ----------------------------------------------------------------------------------------------------------

SMALL = {
    "nq": {
        "question": "q",
        "answers": ["a"],
        "ctxs": [
            {"title": "T", "text": "x", "isgold": True, "hasanswer": True},
            {"id": "7", "title": "U", "text": "y", "isgold": False, "hasanswer": False},
        ],
    },
    "hotpotqa": {
        "_id": "h1",
        "question": "q",
        "answer": "a",
        "type": "bridge",
        "level": "easy",
        "context": [["T", ["x"]]],
        "supporting_facts": [["T", 0]],
    },
    "musique": {
        "id": "2hop__1_2",
        "question": "q",
        "answer": "a",
        "answer_aliases": [],
        "answerable": True,
        "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "x", "is_supporting": True}],
        "question_decomposition": [{}, {}],
    },
    "morehopqa": {
        "_id": "m1",
        "question": "q",
        "answer": "a",
        "context": [["T", ["x"]]],
        "question_decomposition": [{"paragraph_support_title": "T"}],
        "answer_type": "number",
        "no_of_hops": 1,
        "reasoning_type": "Symbolic",
    },
    "multihop-rag": MULTIHOP[0],
    "block-nq": BLOCK,
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nq", {"ctxs": []}, "record 'q': ctxs: .*exactly one passage must have isgold, not 0"),
        ("nq", {"answers": [" ", []]}, "record 'q': answers: .*there is no answer"),
        ("nq", {"answers": [{}]}, "record 'q': answers: .*not dict"),
        ("nq", {"ctxs": [{"title": "T", "isgold": True}]}, "record 'q': ctxs.0.text: Field required"),
        ("hotpotqa", {"context": "{"}, "record 'h1': context: "),
        ("hotpotqa", {"context": [["T", "x"]]}, "record 'h1': context.0.1: .*valid list"),
        ("hotpotqa", {"context": {"title": ["T"], "sentences": []}}, "record 'h1': context: .*zip"),
        ("hotpotqa", {"context": {"title": ["T"]}}, "record 'h1': context: .*valid list"),
        ("hotpotqa", {"answer": None}, "record 'h1': answer: "),
        ("musique", {"id": "q1"}, "record 'q1': id: "),
        ("musique", {"paragraphs": []}, "record '2hop__1_2': paragraphs: "),
        ("morehopqa", {"no_of_hops": "three"}, "record 'm1': no_of_hops: .*integer"),
        ("multihop-rag", {"evidence_list": None}, "there must be an evidence_list or a retrieval_list"),
        ("block-nq", {"documents": [{"title": "T", "text": "x"}]}, "documents.0.score: Field required"),
        (
            "block-nq",
            {"documents": [{"title": "T", "text": "x", "score": float("nan")}]},
            "documents.0.score: .*finite",
        ),
    ],
)
def test_a_wrong_record_is_an_error_that_names_it_and_the_field(name, change, message):
    assert one(name, SMALL[name]).references  # right before the change
    with pytest.raises(TaskError, match=message) as caught:
        list(get(name).items([SMALL[name] | change]))
    assert "\n" not in str(caught.value)


def test_errors_of_a_file_name_its_line(tmp_path):
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps(SMALL["nq"]) + "\n" + json.dumps({"question": "what?"}) + "\n")
    with pytest.raises(TaskError, match=r"nq.jsonl:2: record 'what\?': answers: Field required \(and 1 more\)"):
        items_of("nq", path)


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return Engine.load(folder, dtype="float32")


def shortened(item: Item) -> Item:
    """The item with the beginning of its first documents."""
    return replace(item, documents=tuple(replace(d, text=d.text[:80]) for d in item.documents[:5]))


@pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
@pytest.mark.parametrize("name", QA)
def test_a_task_runs_end_to_end(engine, tmp_path, name):
    source = {
        "multihop-rag": write_json(tmp_path / "MultiHopRAG.json", MULTIHOP),
        **{block: write_json(tmp_path / "dataset.json", [BLOCK]) for block in QA if block.startswith("block-")},
    }.get(name) or sample(name)  # fmt: skip
    data = read(get(name), source, 2)
    if not SOAK:  # a token is a byte here: whole passages take seconds each
        data = data._replace(items=tuple(map(shortened, data.items)))
    for spec in ("block", "graph-kv"):
        out = tmp_path / "out" / spec
        summary = evaluate(engine, get(name), spec, data.items, out, data=data, max_tokens=2, progress=False)
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [item.id for item in data.items]
        assert not any("error" in line for line in lines)
        assert summary["scores"][get(name).metrics[0]]["n"] == len(data.items)
