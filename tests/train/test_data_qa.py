"""Question answering data: exact search that goes on where it stopped, answers that are paid for once, and the records.

The endpoint is real: `kvgraph serve` with the tiny demo model, or an application that misbehaves. The tests of
sentence-transformers models need that library; a folder of real questions is looked for in ../shared/data.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI, Request, Response
from safetensors.torch import load_file, save_file

import embedders
import serving
from kvgraph import demo, models
from kvgraph.cli import main
from kvgraph.data import chat, prompt, tasks
from kvgraph.data.retrieval import RetrievalError
from kvgraph.data.task import Item
from kvgraph.models.embedder import SentenceEmbedder
from kvgraph.train.prepare import SOURCES, answers, qa
from kvgraph.train.prepare.answers import Answers, AnswersError, Endpoint
from kvgraph.train.prepare.rows import Files
from kvgraph.train.prepare.run import prepare
from kvgraph.train.prepare.source import PrepareError

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
SAMPLES = Path(qa.__file__).parent / "samples"
OWN = {"retriever": "none", "answers": "gold"}
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}; set KVGRAPH_DATA to its folder")


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(path: Path, count: int) -> Path:
    return write(
        path, ({"title": f"t{i}", "text": " ".join(f"w{i * j % 97}" for j in range(1, 9))} for i in range(count))
    )


# The best passages


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return embedders.write_encoder(tmp_path_factory.mktemp("encoder"))


@real_data
def test_passages_of_real_questions_equal_a_search_by_hand(encoder, tmp_path):
    """Pooled and from a collection, through the whole preparation; the best ten by float64 scores, and these alone."""
    records = gzip.decompress((DATA / "2wikimultihopqa/2wiki_train_500.jsonl.gz").read_bytes()).splitlines()[:30]
    source = tmp_path / "2wiki.jsonl"
    source.write_bytes(b"\n".join(records))
    settings = {"retriever": str(encoder), "answers": "gold"}
    prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "out", settings=settings, validation=0)
    pool = [p for r in map(json.loads, records) for p in qa.wiki(_row(r)).passages]
    pool = list({json.dumps(p): p for p in pool}.values())
    assert lines(tmp_path / "out/qa-2wiki/passages.jsonl") == pool
    model = SentenceEmbedder(str(encoder))
    vectors = model.passages([f"{p['title']} {p['text']}" for p in pool]).astype(np.float16).astype(np.float64)
    made = lines(tmp_path / "out/train.jsonl")
    assert len(made) == 30
    for record in made:
        scores = vectors @ model.questions([record["question"]])[0].astype(np.float64)
        got = [float(scores[pool.index(p)]) for p in record["documents"]]
        np.testing.assert_allclose(got, sorted(scores.tolist(), reverse=True)[:10], rtol=1e-5)

    write(tmp_path / "collection.jsonl", pool[:40])
    settings |= {"corpus": str(tmp_path / "collection.jsonl"), "index": str(tmp_path / "index")}
    prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "by", settings=settings, validation=0)
    assert all(p in pool[:40] for record in lines(tmp_path / "by/train.jsonl") for p in record["documents"])
    assert (tmp_path / "index/embeddings.float16").stat().st_size == 40 * 32 * 2

    settings = {"retriever": str(encoder), "answers": "gold", "corpus": "own"}
    prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "own", settings=settings, validation=0)
    for record, raw in zip(lines(tmp_path / "own/train.jsonl"), map(json.loads, records), strict=True):
        own = qa.wiki(_row(raw)).passages
        assert sorted(map(json.dumps, record["documents"])) == sorted(map(json.dumps, own))


def _row(record):
    from kvgraph.train.prepare.source import RawRow

    return RawRow(0, "here", record, {})


# Answers


class Misbehaving:
    """An OpenAI-compatible application that does to a request what its user message says, and counts all of it."""

    def __init__(self):
        self.asked: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.finish: list[str] = []
        self.times: list[tuple[str, float]] = []
        self.now = self.most = 0
        self.wait, self.status, self.good = 0.0, 0, 0
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.complete)
        self.app.get("/ready")(lambda: {})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        said = body["messages"][-1]["content"]
        self.asked[said] += 1
        self.keys.add(request.headers["authorization"])
        self.times.append((said, time.monotonic()))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.wait)
            return await self.answer(said.split()[0], self.asked[said], said)
        finally:
            self.now -= 1

    async def answer(self, what: str, times: int, said: str) -> Response:
        if self.status and self.asked.total() > self.good:
            return Response("{}", self.status, {"x-should-retry": "false"})
        if what == "busy" and times == 1:
            return Response("{}", 429, {"retry-after": "1"})
        if (what == "broken" and times <= 2) or what == "down":
            return Response("oops", 500)
        if what == "slow" and times == 1:
            await asyncio.sleep(0.8)
        if what == "endless":
            await asyncio.sleep(1)
        if what == "no-json":
            return Response("{nonsense", 200, media_type="application/json")
        if what == "a-page":
            return Response("<html>", 200, media_type="text/html")
        if what == "a-list":
            return Response("[1, 2]", 200, media_type="application/json")
        if status := {"refused": 400, "no-key": 401, "no-model": 404}.get(what):
            return Response(json.dumps({"error": {"message": f"{what} it is"}}), status, media_type="application/json")
        finish = {"cut": "length", "filtered": "content_filter"}.get(what, "stop")
        finish = self.finish.pop(0) if self.finish else finish
        text = {"empty": " ", "nothing": None}.get(what, f" reply to {said}\n")
        choices = [] if what == "no-choice" else [_choice(text, finish)]
        usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
        return Response(
            json.dumps(answer | ({} if what == "uncounted" else {"usage": usage})), 200, media_type="application/json"
        )


def _choice(text, finish) -> dict:
    return {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}


@pytest.fixture
def misbehaving():
    server = Misbehaving()
    with serving.serving(server.app) as server.url:
        server.url += "/v1"
        yield server


def ask(path: Path, endpoint: Endpoint, said: list[str]) -> tuple[list[answers.Reply], answers.Spent]:
    requests = ((answers.AnswerRequest(text, [{"role": "user", "content": text}]), text) for text in said)
    with Answers(path, endpoint) as made:
        got = list(made.ask(requests))
        assert [text for text, _ in got] == said  # in order
        return [reply for _, reply in got], made.spent


def test_every_kind_of_trouble_has_its_end(misbehaving, tmp_path, monkeypatch):
    """What can be retried is, the rest is a reason; the server's wish to wait is respected; nothing paid for is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    expected = {
        "busy": "",
        "broken": "",
        "slow": "",
        "uncounted": "",
        "fine": "",
        "no-json": "malformed reply",
        "a-page": "malformed reply",
        "a-list": "malformed reply",
        "no-choice": "malformed reply",
        "nothing": "empty reply",
        "empty": "empty reply",
        "cut": "longer than 200 tokens",
        "filtered": "filtered by the endpoint",
        "refused": "HTTP 400",
        "down": "HTTP 500",
        "endless": "no reply in time",
    }
    endpoint = Endpoint("m", misbehaving.url, 16, (1.0, 100.0), timeout=0.5, retries=2)
    replies, spent = ask(tmp_path / "answers.jsonl", endpoint, list(expected))
    assert dict(zip(expected, [reply.reason for reply in replies], strict=True)) == expected
    for said, reply in zip(expected, replies, strict=True):
        assert reply.answer == (None if reply.reason else f"reply to {said}")
    assert misbehaving.asked["busy"] == 2 and misbehaving.asked["broken"] == 3 and misbehaving.asked["slow"] == 2
    assert misbehaving.asked["down"] == misbehaving.asked["endless"] == 3  # the first time and two retries
    first, second = (at for said, at in misbehaving.times if said == "busy")
    assert 1 <= second - first < 2
    counted = 9  # busy, broken, slow, fine, no-choice, nothing, empty, cut, filtered
    assert (spent.read, spent.written) == (counted * 1000, counted * 10)
    assert spent.dollars == pytest.approx(counted * (1000 * 1 + 10 * 100) / 1e6)
    assert str(spent) == "9,000 tokens read, 90 written, $0.0180"

    before = misbehaving.asked.copy()
    again, spent_again = ask(tmp_path / "answers.jsonl", replace(endpoint, retries=0), list(expected))
    assert [reply.reason for reply in again] == list(expected.values())
    assert set(misbehaving.asked - before) == {"refused", "down", "endless"}  # for these nothing was paid
    assert spent_again == spent
    assert misbehaving.keys == {"Bearer sk-secret"}
    assert b"secret" not in (tmp_path / "answers.jsonl").read_bytes()


def test_requests_run_together_and_never_more_than_allowed(misbehaving, tmp_path):
    misbehaving.wait = 0.05
    said = [f"fine {i}" for i in range(30)]
    started = time.monotonic()
    ask(tmp_path / "answers.jsonl", Endpoint("m", misbehaving.url, 5), said)
    assert misbehaving.most == 5
    assert time.monotonic() - started < 30 * 0.05
    assert set(misbehaving.asked.values()) == {1}


def test_the_same_question_twice_is_asked_once(misbehaving, tmp_path):
    misbehaving.wait = 0.05
    replies, spent = ask(tmp_path / "answers.jsonl", Endpoint("m", misbehaving.url, 5), ["fine 1"] * 30)
    assert len(replies) == 30 and misbehaving.asked == {"fine 1": 1} and spent.read == 1000


def test_who_stops_early_pays_for_little_more(misbehaving, tmp_path):
    misbehaving.wait = 0.02
    endpoint = Endpoint("m", misbehaving.url, 3)
    requests = ((answers.AnswerRequest("", [{"role": "user", "content": f"fine {i}"}]), i) for i in range(1000))
    with Answers(tmp_path / "answers.jsonl", endpoint) as made:
        for i, _ in made.ask(requests):
            if i == 9:
                break
    journal = lines(tmp_path / "answers.jsonl")
    assert 10 <= len(journal) <= 10 + answers.AHEAD * 3
    assert misbehaving.asked.total() == len(journal)  # what was on its way was waited for
    ask(tmp_path / "answers.jsonl", endpoint, [f"fine {i}" for i in range(40)])
    assert set(misbehaving.asked.values()) == {1}


@pytest.mark.parametrize(("said", "message"), [("no-key", "no-key it is"), ("no-model", "refuses the model m")])
def test_a_wrong_key_or_model_stops_at_once(misbehaving, tmp_path, said, message):
    with pytest.raises(AnswersError, match=message):
        ask(tmp_path / "answers.jsonl", Endpoint("m", misbehaving.url, 2), [f"{said} {i}" for i in range(100)])
    assert misbehaving.asked.total() <= 4


def test_an_endpoint_that_never_answers_stops_after_some(tmp_path, misbehaving):
    with pytest.raises(AnswersError, match="20 requests in a row gave no answer, the last one: HTTP 500"):
        ask(
            tmp_path / "answers.jsonl", Endpoint("m", misbehaving.url, 10, retries=0), [f"down {i}" for i in range(100)]
        )
    assert misbehaving.asked.total() <= 20 + answers.AHEAD * 10
    with pytest.raises(AnswersError, match="the last one: no connection"):
        ask(
            tmp_path / "answers.jsonl", Endpoint("m", "http://127.0.0.1:9/v1", 10, retries=0), list(map(str, range(30)))
        )


def test_an_outage_skips_no_question(misbehaving, tmp_path):
    """What wasn't answered because the endpoint was down is no outcome: it is asked when the same is run again."""
    source = write(tmp_path / "a.jsonl", map(question, range(30)))
    settings = {"retriever": "none", "answers": "m", "concurrency": "2"}

    def run(url: str) -> dict:
        return prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "out", settings=settings | {"url": url}, limit=25)

    misbehaving.status, misbehaving.good = 503, 8
    for _ in range(2):
        with pytest.raises(AnswersError, match="20 requests in a row gave no answer, the last one: HTTP 503"):
            run(misbehaving.url)
    misbehaving.status = 0
    state = run(misbehaving.url)
    assert state["counts"]["skipped"] == {} and state["counts"]["read"] == 25
    ids = [record["id"] for split in ("train", "validation") for record in lines(tmp_path / f"out/{split}.jsonl")]
    assert sorted(ids) == sorted(f"qa-2wiki-{i}" for i in range(25))


def test_a_few_questions_to_an_endpoint_that_is_down(misbehaving, tmp_path):
    endpoint = Endpoint("m", misbehaving.url, 2, retries=0)
    with pytest.raises(AnswersError, match="no request was answered: HTTP 500; run the same command again"):
        ask(tmp_path / "answers.jsonl", endpoint, ["down 1", "down 2"])
    replies, _ = ask(tmp_path / "answers.jsonl", endpoint, ["down 1", "fine", "down 2"])
    assert [reply.reason for reply in replies] == ["HTTP 500", "", "HTTP 500"]
    replies, _ = ask(tmp_path / "answers.jsonl", endpoint, ["refused", "cut"])  # these say something about the question
    assert [reply.reason for reply in replies] == ["HTTP 400", "longer than 200 tokens"]


def test_openai_needs_a_key(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AnswersError, match="OPENAI_API_KEY isn't set"):
        ask(tmp_path / "answers.jsonl", Endpoint(), ["fine"])


def test_a_torn_journal_loses_its_last_line_alone(misbehaving, tmp_path):
    path, endpoint = tmp_path / "answers.jsonl", Endpoint("m", misbehaving.url, 1)
    ask(path, endpoint, ["fine 1", "fine 2"])
    os.truncate(path, path.stat().st_size - 3)
    ask(path, endpoint, ["fine 1", "fine 2"])
    assert misbehaving.asked == {"fine 1": 1, "fine 2": 2} and len(lines(path)) == 2
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(AnswersError, match="answers.jsonl:1 isn't an answer"):
        ask(path, endpoint, ["fine 1"])


def test_another_model_or_prompt_is_another_answer(misbehaving, tmp_path):
    path = tmp_path / "answers.jsonl"
    ask(path, Endpoint("m", misbehaving.url), ["fine"])
    ask(path, Endpoint("other", misbehaving.url), ["fine"])
    ask(path, Endpoint("m", misbehaving.url, max_tokens=100), ["fine", "fine!"])
    assert misbehaving.asked == {"fine": 3, "fine!": 1}


# Records


def prepared(out: Path, name: str, source: Path, **settings: str) -> list[dict]:
    """The records made of a source, all of them for training."""
    prepare(SOURCES[name], Files(source, read=SOURCES[name].read), out, settings=settings, validation=0)
    return lines(out / "train.jsonl")


def question(i: int) -> dict:
    """A record of 2WikiMultiHopQA."""
    return {
        "_id": f"q{i}",
        "type": "compositional",
        "question": f"Who is p{i}?",
        "answer": f"gold {i}",
        "context": [[f"p{i}", [f"p{i} is one.", f"She was born in c{i}."]], ["c", ["c is a town."]]],
        "supporting_facts": [[f"p{i}", 0]],
    }


def test_a_record_has_the_task_the_passages_in_order_and_the_answer(tmp_path):
    (made,) = prepared(tmp_path / "out", "qa-2wiki", write(tmp_path / "a.jsonl", [question(7)]), **OWN)
    assert made == {
        "id": "qa-2wiki-0",
        "task": "2wiki",
        "question": "Who is p7?",
        "documents": [
            {"title": "p7", "text": "p7 is one. She was born in c7."},
            {"title": "c", "text": "c is a town."},
        ],
        "answer": "gold 7",
    }


@pytest.mark.parametrize(("name", "task"), [("qa-2wiki", "2wiki"), ("qa-trivia", "triviaqa")])
def test_the_samples_make_records(tmp_path, name, task):
    made = prepared(tmp_path, name, SAMPLES / SOURCES[name].sample, **OWN)
    assert len(made) == 6 and {record["task"] for record in made} == {task}
    assert all(0 < len(record["documents"]) <= 10 and record["answer"] for record in made)
    assert all(
        any(record["answer"].lower() in f"{d['title']} {d['text']}".lower() for d in record["documents"])
        for record in made
        if record["id"] not in ("qa-2wiki-1", "qa-2wiki-5")
    )


def test_pages_are_cut_into_passages_of_a_hundred_words(tmp_path):
    page = " ".join(f"word{i}" for i in range(250))
    passages = list(qa.cut("Page", f"  {page}\n"))
    assert [len(p["text"].split()) for p in passages] == [100, 100, 50]
    assert " ".join(p["text"] for p in passages) == page and {p["title"] for p in passages} == {"Page"}


def test_trivia_reads_what_fid_brings(tmp_path):
    record = {
        "question": "Who?",
        "answers": ["Her", "She"],
        "target": "HER",
        "ctxs": [{"id": str(i), "title": f"t{i}", "text": f"x{i}", "score": "1"} for i in range(100)],
    }
    (tmp_path / "train.json").write_text(json.dumps([record]))
    (made,) = prepared(tmp_path / "out", "qa-trivia", tmp_path / "train.json", **OWN)
    assert made["answer"] == "HER" and made["documents"] == [{"title": f"t{i}", "text": f"x{i}"} for i in range(10)]


@real_data
def test_trivia_reads_the_original_layout_and_its_training_questions_alone(tmp_path):
    archive = DATA / "triviaqa/triviaqa-sample.tgz"
    with pytest.raises(PrepareError, match="is packed; unpack it"):
        prepared(tmp_path / "out", "qa-trivia", archive, **OWN)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "trivia", filter="data")
    made = prepared(tmp_path / "all", "qa-trivia", tmp_path / "trivia", **OWN)
    files = [
        json.loads((tmp_path / f"trivia/qa/{kind}-train.json").read_text())["Data"] for kind in ("web", "wikipedia")
    ]
    assert [record["question"] for record in made] == [q["Question"] for data in files for q in data]
    one = prepared(tmp_path / "one", "qa-trivia", tmp_path / "trivia/qa/wikipedia-train.json", **OWN)
    assert [record["question"] for record in one] == [q["Question"] for q in files[1]]


def test_a_bad_record_is_an_error_with_its_line(tmp_path):
    for bad, message in (
        ({"question": "no more"}, r"a.jsonl:2: .*Field required"),
        (question(0) | {"answer": "\ud800"}, "surrogate"),
    ):
        source = write(tmp_path / "a.jsonl", [question(0), bad])
        with pytest.raises(PrepareError, match=message):
            prepared(tmp_path / message[:3], "qa-2wiki", source, **OWN)


def test_the_endpoint_is_asked_what_the_evaluation_would_ask(tmp_path):
    (tmp_path / "model").mkdir()
    demo.write_model(tmp_path / "model", seed=1)  # which replies something
    tokenizer = models.load_tokenizer(str(tmp_path / "model"))
    for name in ("2wiki", "triviaqa"):
        task = tasks.get(name)
        documents = (chat.Document("Text {here}.", "A title"), chat.Document("No title.", ""))
        built = prompt.build(task, Item("i", "Who?", ("x",), documents), tokenizer)
        found = qa.Found(
            SimpleNamespace(where="here"),
            qa.RetrievalQuestion("Who?", "x", ()),
            tuple({"title": d.title, "text": d.text} for d in documents),
        )
        asked = SOURCES[{"2wiki": "qa-2wiki", "triviaqa": "qa-trivia"}[name]].outcomes._request(*found)
        rendered = tokenizer.apply_chat_template(list(asked.messages), tokenize=False, add_generation_prompt=True)
        assert rendered == "".join((*built.prefix, *built.segments, built.query))


def test_generated_answers_come_from_a_kvgraph_server(tmp_path):
    """The tiny model answers at random, here with an end that is likely; what it doesn't end is counted as too long."""
    (tmp_path / "model").mkdir()
    demo.write_model(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["lm_head.weight"][demo.token_id("<|end|>")] *= 1.5
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    source = write(tmp_path / "source.jsonl", map(question, range(12)))
    settings = {"retriever": "none", "answers": "model", "concurrency": "4"}
    with serving.serve(tmp_path / "model") as url:
        settings["url"] = f"{url}/v1"
        state = prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "out", settings=settings, validation=0)
    made, journal = lines(tmp_path / "out/train.jsonl"), lines(tmp_path / "out/qa-2wiki/answers.jsonl")
    assert len(journal) == 12 and len(made) == sum(row["answer"] is not None for row in journal) > 0
    assert len(made) + sum(state["counts"]["skipped"].values()) == 12
    assert set(state["counts"]["skipped"]) <= {"no answer: longer than 200 tokens", "no answer: empty reply"}
    assert {record["answer"] for record in made} == {row["answer"] for row in journal} - {None}
    assert all(row["tokens"][0] > 100 for row in journal)


def test_the_command_shows_what_was_spent_and_skipped(misbehaving, tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [question(0), question(1), question(2)])
    sets = ["retriever=none", "answers=m", f"url={misbehaving.url}", "prices=1/100", "concurrency=1"]
    command = ["data", "prepare", "qa-2wiki", "--source", source, "--out", tmp_path / "out", "--validation", 0]
    misbehaving.finish = ["stop", "length", "stop"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command] + [word for value in sets for word in ("--set", value)])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert re.search(r"train +2 +4 ", out) and re.search(r"no answer: longer than 200 tokens +1\b", out)
    assert "qa-2wiki: answers: 3,000 tokens read, 30 written, $0.0060" in out


def test_a_limit_is_what_is_paid_for(misbehaving, tmp_path):
    source = write(tmp_path / "a.jsonl", map(question, range(200)))
    settings = {"retriever": "none", "answers": "m", "url": misbehaving.url, "concurrency": "2"}
    for limit in (5, 20):  # a larger one goes on, with what is there
        prepare(SOURCES["qa-2wiki"], Files(source), tmp_path / "out", settings=settings, limit=limit, validation=0)
        assert len(lines(tmp_path / "out/train.jsonl")) == limit
        assert limit <= misbehaving.asked.total() <= limit + answers.AHEAD * 2
    assert set(misbehaving.asked.values()) == {1}


@pytest.mark.parametrize(
    ("name", "value"), [("prices", "1"), ("prices", "1/-1"), ("concurrency", "0"), ("prices", "a/b")]
)
def test_settings_that_are_no_numbers(tmp_path, name, value):
    with pytest.raises(PrepareError, match="prices are two numbers"):
        prepared(
            tmp_path / "o", "qa-2wiki", write(tmp_path / "a.jsonl", [question(0)]), retriever="none", **{name: value}
        )


def test_a_killed_preparation_goes_on_and_pays_for_nothing_twice(misbehaving, tmp_path):
    """SIGKILL while answers arrive. Only what was on its way at that moment is asked again; the records are the same."""
    misbehaving.wait = 0.05
    source = write(tmp_path / "a.jsonl", map(question, range(60)))
    settings = {"retriever": "none", "answers": "m", "url": misbehaving.url, "concurrency": "4"}
    script = (
        "import sys, json; from pathlib import Path\n"
        "from kvgraph.train.prepare import SOURCES; from kvgraph.train.prepare.rows import Files\n"
        "from kvgraph.train.prepare.run import prepare\n"
        "prepare(SOURCES['qa-2wiki'], Files(Path(sys.argv[1])), sys.argv[2], settings=json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out"), json.dumps(settings)]
    journal = tmp_path / "out/qa-2wiki/answers.jsonl"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 15:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    paid = {row["answer"] for row in map(json.loads, journal.read_bytes().split(b"\n")[:-1])}
    before = misbehaving.asked.copy()
    subprocess.run(command, check=True, timeout=60)
    again = {said for said in before if misbehaving.asked[said] > before[said]}
    assert len(before) < 60 and len(again) <= 4  # what was on its way
    assert not paid & {f"reply to {said}" for said in again}
    misbehaving.wait = 0
    whole = tmp_path / "whole"
    prepare(SOURCES["qa-2wiki"], Files(source), whole, settings=settings)
    for split in ("train", "validation"):
        assert (tmp_path / f"out/{split}.jsonl").read_bytes() == (whole / f"{split}.jsonl").read_bytes()
    assert len(lines(whole / "train.jsonl")) + len(lines(whole / "validation.jsonl")) == 60


def test_files_of_other_questions_are_refused(encoder, tmp_path):
    out, settings = tmp_path / "out", {"answers": "gold", "retriever": str(encoder)}
    prepared(out, "qa-2wiki", write(tmp_path / "a.jsonl", map(question, range(3))), **settings)
    for name in ("train.jsonl", "validation.jsonl", "prepared.json"):
        (out / name).unlink()
    with pytest.raises(PrepareError, match="is of other questions than .*b.jsonl:1; delete it"):
        prepared(out, "qa-2wiki", write(tmp_path / "b.jsonl", map(question, range(3, 6))), **settings)


def test_a_pool_that_was_half_gathered_is_gathered_anew(encoder, tmp_path):
    source, settings = (
        write(tmp_path / "a.jsonl", map(question, range(20))),
        {"answers": "gold", "retriever": str(encoder)},
    )
    whole = prepared(tmp_path / "whole", "qa-2wiki", source, **settings)
    pool = (tmp_path / "whole/qa-2wiki/passages.jsonl").read_bytes()
    half = tmp_path / "half/qa-2wiki"
    half.mkdir(parents=True)
    (half / "passages.jsonl").write_bytes(pool[:100])
    (half / ".questions.jsonl.0.part").write_bytes(b'"Who')
    assert prepared(tmp_path / "half", "qa-2wiki", source, **settings) == whole
    assert (half / "passages.jsonl").read_bytes() == pool and pool.count(b"\n") == 21  # "c" comes once


def test_a_collection_can_serve_questions_without_passages(encoder, tmp_path):
    bare = {"question": "Who?", "question_id": "q", "answer": {"value": "Her", "aliases": []}}
    source, corpus = write(tmp_path / "a.jsonl", [bare]), numbered(tmp_path / "corpus.jsonl", 12)
    (made,) = prepared(
        tmp_path / "out", "qa-trivia", source, answers="gold", retriever=str(encoder), corpus=str(corpus)
    )
    assert len(made["documents"]) == 10 and made["answer"] == "Her"
    with pytest.raises(PrepareError, match="has no passages; give a corpus"):
        prepared(tmp_path / "none", "qa-trivia", source, **OWN)
    with pytest.raises(PrepareError, match="a corpus needs a retriever"):
        prepared(tmp_path / "two", "qa-trivia", source, **OWN, corpus=str(corpus))
    with pytest.raises(RetrievalError, match="can't read"):
        prepared(tmp_path / "no", "qa-trivia", source, answers="gold", retriever=str(encoder), corpus="missing.jsonl")
