"""Evaluation runs: what they leave behind, that nothing interrupts them for good, and what they refuse.

The model is the demo's tiny random Llama; its answers mean nothing, but they are always the same.
"""

import gzip
import json
import os
import random
import resource
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from commands import Command
from eval_worker import METHOD, TASK, items
from kvgraph import Engine, KVGraphError, PlanError, demo, methods, models
from kvgraph.cli import main
from kvgraph.data import prompt
from kvgraph.data.chat import Document
from kvgraph.data.io import locked
from kvgraph.data.items import Data, read
from kvgraph.data.task import Hub, Item, TaskError
from kvgraph.eval import stats
from kvgraph.eval.metrics import METRICS
from kvgraph.eval.run import evaluate, slug
from kvgraph.eval.runs import RunError
from soak import SOAK

KILLS = 30 if SOAK else 3
MAY_DIFFER = ("timing", "environment")

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder."""
    path = tmp_path_factory.mktemp("model")
    demo.write_model(path, seed=2)  # which says something to each item
    return path


@pytest.fixture(scope="module")
def model(folder):
    return models.load(str(folder))


@pytest.fixture
def engine(model):
    with Engine(model) as made:
        yield made


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory) -> Path:
    """A run of METHOD that nothing interrupted."""
    path = tmp_path_factory.mktemp("reference") / "run"
    with Engine(model) as engine:
        evaluate(engine, TASK, METHOD, items(), path)
    return path


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def lasting(run: Path) -> bytes:
    """All that a run leaves, byte by byte, without what may differ between two runs of the same thing."""
    kept = [{k: v for k, v in line.items() if k not in MAY_DIFFER} for line in lines(run)]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return json.dumps([kept, {k: v for k, v in summary.items() if k not in MAY_DIFFER}]).encode()


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_line_says_everything_about_its_item(reference, engine):
    asked = items()
    found = lines(reference)
    assert [line["id"] for line in found] == [item.id for item in asked]
    line, item = found[3], asked[3]
    assert (line["kind"], line["facts"]) == ("odd", {"first": 3})
    assert line["documents"] == [document.id for document in item.documents]
    assert line["edges"] == [[0, 1], [0, 2]]
    assert line["golds"] == list(item.references)
    graph = prompt.build(TASK, item, engine.model.tokenizer).graph([(0, 1), (0, 2)])
    plan = engine.plan(graph, METHOD)
    result = engine.generate(graph, METHOD, max_tokens=8)
    assert (line["prediction"], line["finish_reason"]) == (result.text, result.finish_reason)
    assert line["extracted"] == line["prediction"]
    assert line["scores"] == {name: METRICS[name](result.text, item.references) for name in TASK.metrics}
    assert line["usage"] == {
        "prompt_tokens": result.usage.prompt_tokens,
        "plan_tokens": sum(map(len, plan.spans)),
        "live_tokens": len(plan.prompt),
        "probe_tokens": 0,
        "completion_tokens": len(result.token_ids),
        "kv_bytes": result.usage.kv_bytes,
    }
    timing = line["timing"]
    spent = timing["document_tokens_computed"] + sum(timing["reused_tokens"].values()) + line["usage"]["live_tokens"]
    assert spent >= line["usage"]["prompt_tokens"]  # intermediate versions are computed, too
    assert 0 <= timing["queued"] <= timing["ttft"]


def test_the_summary_adds_the_lines_up_and_says_how_they_were_made(reference, model):
    summary, found = json.loads((reference / "summary.json").read_text()), lines(reference)
    scores = [line["scores"]["string_match_all"] for line in found]
    assert len(set(scores)) > 1, "the test data should have items that differ"
    assert summary["scores"]["string_match_all"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert (
        summary["scores"]["string_match_all"]["low"]
        < summary["scores"]["string_match_all"]["mean"]
        < summary["scores"]["string_match_all"]["high"]
    )
    assert summary["headline"] == "string_match_all"
    odd = [line["scores"]["string_match_all"] for line in found if line["kind"] == "odd"]
    assert summary["by"]["kind"]["odd"]["string_match_all"]["mean"] == pytest.approx(sum(odd) / len(odd))
    assert list(summary["by"]["first"]) == [str(i) for i in range(10)]  # in order of the numbers
    assert summary["method"] == {"spec": METHOD, "name": METHOD, "fields": asdict(methods.get(METHOD))}
    assert summary["model"] == {
        "name": model.name, "fingerprint": model.fingerprint, "dtype": "float32", "layers": len(model.layers)
    }  # fmt: skip
    assert summary["prompt"]["question"] == TASK.question and summary["edges"] == "top-k:1"
    assert summary["decode"]["temperature"] == 0 and summary["decode"]["max_tokens"] == 8
    assert summary["tokens"]["prompt"] == sum(line["usage"]["prompt_tokens"] for line in found)
    assert summary["timing"]["tokens"]["computed"] == sum(line["timing"]["computed_tokens"] for line in found)
    assert summary["timing"]["items"] == summary["data"]["items"] == summary["scores"]["string_match_all"]["n"] == 12
    assert (summary["errors"], summary["sets"]) == (0, {})
    assert set(summary["environment"]["versions"]) >= {"kvgraph", "python", "torch", "transformers"}


def test_the_same_seed_gives_the_same_files_cold_warm_batched_or_one_by_one(reference, model, tmp_path):
    for name, window in (("cold", 32), ("warm", 32), ("single", 1)):
        with Engine(model, store=tmp_path / "kv") as engine:
            summary = evaluate(engine, TASK, METHOD, items(), tmp_path / name, window=window)
        assert lasting(tmp_path / name) == lasting(reference)
        assert (summary["timing"]["tokens"]["documents_computed"] == 0) is (name != "cold")
    another = tmp_path / "another seed"
    with Engine(model) as engine:
        evaluate(engine, TASK, METHOD, items(), another, seed=1)
    assert lines(another)[0]["prediction"] == lines(reference)[0]["prediction"]
    assert lasting(another) != lasting(reference)  # the intervals were drawn again


def test_methods_that_read_no_edges_get_the_same_documents_without(reference, engine, tmp_path):
    summary = evaluate(engine, TASK, "block", items(), tmp_path)
    assert summary["edges"] is None
    for line, other in zip(lines(tmp_path), lines(reference), strict=True):
        assert line["edges"] == [] and line["documents"] == other["documents"]
    same = ("prompt", "decode", "data", "items_sha256", "model")
    theirs = json.loads((reference / "summary.json").read_text())
    assert {key: summary[key] for key in same} == {key: theirs[key] for key in same}


def test_clusters_are_the_tasks_or_made_by_what_items_read(engine, tmp_path):
    a, b, c = (Document(text, "t", id="0") for text in ("one ", "two ", "three "))
    read = [(a, b), (b, a), (a, c), (a, b), (), ()]
    asked = [replace(items(1)[0], id=str(i), documents=documents) for i, documents in enumerate(read)]
    asked[3] = replace(asked[3], cluster="its own")
    evaluate(engine, TASK, "block", asked, tmp_path)
    first, second, *others = stats.clusters_of(lines(tmp_path))
    assert first == second and len({first, *others}) == 5


def test_what_a_probe_costs_is_counted_and_does_not_depend_on_the_store(model, tmp_path):
    for name in ("cold", "warm"):
        with Engine(model, store=tmp_path / "kv") as engine:
            summary = evaluate(engine, TASK, "cacheblend", items(4), tmp_path / name)
    assert lasting(tmp_path / "warm") == lasting(tmp_path / "cold")
    found = lines(tmp_path / "warm")
    assert summary["timing"]["tokens"]["documents_computed"] == 0
    assert summary["tokens"]["probe"] == sum(line["usage"]["probe_tokens"] for line in found) > 0
    assert all(0 < line["timing"]["probe"] <= line["timing"]["queued"] for line in found)


def test_links_and_given_edges(engine, tmp_path):
    linked = [replace(item, links=((2, 0), (0, 1))) for item in items(2)]
    evaluate(engine, TASK, METHOD, linked, tmp_path / "links", edges="links")
    assert lines(tmp_path / "links")[0]["edges"] == [[2, 0], [0, 1]]
    evaluate(engine, TASK, METHOD, linked, tmp_path / "chain", edges="chain")
    assert lines(tmp_path / "chain")[0]["edges"] == [[0, 1], [1, 2]]


def test_set_scores_belong_to_their_metric(engine, tmp_path):
    task = replace(TASK, metrics=("word_overlap",))
    hit = [replace(item, references=("x",)) for item in items(4)]
    summary = evaluate(engine, task, "block", hit, tmp_path)
    share = summary["scores"]["word_overlap"]["mean"]
    assert summary["sets"]["multihop_rag"]["overall"]["recall"] == share
    assert set(summary["sets"]["multihop_rag"]["by_kind"]) == {"even", "odd"}


def test_an_item_that_cannot_run_scores_0_and_stops_nothing(engine, tmp_path):
    asked = items(4)
    asked[1] = replace(asked[1], documents=(*asked[1].documents[:2], Document("x" * engine.model.limit)))
    asked[2] = replace(asked[2], documents=asked[2].documents[:1])
    summary = evaluate(engine, TASK, METHOD, asked, tmp_path, edges="star:2")
    assert summary["errors"] == 2 and summary["finish"]["error"] == 2
    assert summary["scores"]["string_match_all"]["n"] == 4
    good, long, small, other = lines(tmp_path)
    assert "limit" in long["error"] and "2" in small["error"]
    assert long["scores"] == small["scores"] == {"string_match_all": 0, "substring_em": 0}
    assert "error" not in good and "error" not in other and good["prediction"]
    with pytest.raises(PlanError, match="limit"):  # what the line says is what the engine says
        engine.generate(prompt.build(TASK, asked[1], engine.model.tokenizer).graph(), "full")


def test_an_item_above_the_budget_is_an_error_in_its_line(model, tmp_path):
    with Engine(model, kv_budget=600 * model.kv_bytes_per_token) as engine:
        asked = [items(1)[0], replace(items(2)[1], documents=(Document("x" * 700),))]
        summary = evaluate(engine, TASK, "block", asked, tmp_path)
    assert summary["errors"] == 1
    assert "budget" in lines(tmp_path)[1]["error"]


# -- interrupted, and gone on with ------------------------------------------------------------------------------------


def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(reference, folder, tmp_path):
    def started(folder_of_run: Path) -> Command:
        return Command(folder, folder_of_run, module="eval_worker")

    rng = random.Random(0)
    run, whole, cut_short = tmp_path / "run", tmp_path / "whole", 0
    assert started(whole).wait() == 0
    done: set[bytes] = set()
    for _ in range(KILLS):
        process = started(run)
        enough = min(len(done) + rng.randrange(4), 11)  # so many of the 12 are done before the kill, or a few more
        late = time.monotonic() + 60
        while not (run / "results.jsonl").exists() or (run / "results.jsonl").read_bytes().count(b"\n") < enough:
            assert time.monotonic() < late, "the run doesn't get on"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        cut_short += process.wait() == -signal.SIGKILL
        now = (run / "results.jsonl").read_bytes() if (run / "results.jsonl").exists() else b""
        assert done <= (done := set(now.split(b"\n")[:-1])), "a finished item was done again"
    assert cut_short >= 2, "the kills came too late to show anything"
    assert started(run).wait() == 0
    assert done <= set((run / "results.jsonl").read_bytes().split(b"\n"))
    assert lasting(run) == lasting(reference) == lasting(whole)


def test_a_torn_last_line_is_done_again_and_nothing_else(reference, engine, tmp_path):
    run = copied(reference, tmp_path, summary=False)
    text = (run / "results.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    kept = text[: ends[4]]
    (run / "results.jsonl").write_bytes(text[: ends[4] + 30])
    evaluate(engine, TASK, METHOD, items(), run)
    assert (run / "results.jsonl").read_bytes().startswith(kept), "lines that were there have their old timing"
    assert lasting(run) == lasting(reference)
    assert json.loads((run / "summary.json").read_text())["timing"]["items"] == 7


def test_a_finished_run_is_only_read(reference, engine, tmp_path):
    run = copied(reference, tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
    summary = evaluate(engine, TASK, METHOD, items(), run)
    assert summary == json.loads(before["summary.json"][0])
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir() if path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("finished", [True, False])
def test_items_that_failed_run_again_and_no_others(model, tmp_path, finished):
    asked = items(4)
    asked[1] = replace(asked[1], documents=(Document("x" * 700),))  # more than the small budget has room for
    asked[2] = replace(asked[2], documents=(Document("x" * model.limit),))  # too long for any
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    with Engine(model, kv_budget=600 * model.kv_bytes_per_token) as engine:
        assert evaluate(engine, TASK, "block", asked, run)["errors"] == 2
        before = lasting(run)
        evaluate(engine, TASK, "block", asked, run)
        assert lasting(run) == before
    answered = [line for line in lines(run) if "error" not in line]
    if not finished:
        (run / "summary.json").unlink()
    with Engine(model) as engine:
        summary = evaluate(engine, TASK, "block", asked, run)
        evaluate(engine, TASK, "block", asked, fresh)
    assert summary["errors"] == 1 and summary["timing"]["items"] == 2
    assert lasting(run) == lasting(fresh)
    assert [line for line in lines(run) if line in answered] == answered, "an answer was asked for again"


def test_a_run_whose_failed_items_are_running_again_is_not_finished(model, tmp_path, monkeypatch):
    asked = [replace(items(1)[0], documents=(Document("x" * model.limit),))]
    with Engine(model) as engine:
        evaluate(engine, TASK, "block", asked, tmp_path)
        monkeypatch.setattr(engine, "run", lambda *given, **more: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            evaluate(engine, TASK, "block", asked, tmp_path)
    assert not (tmp_path / "summary.json").exists() and lines(tmp_path) == []


def test_lines_in_the_order_of_finishing_are_put_in_that_of_the_items(reference, engine, tmp_path):
    run = copied(reference, tmp_path, summary=False)
    whole = (run / "results.jsonl").read_bytes().splitlines(keepends=True)
    (run / "results.jsonl").write_bytes(b"".join(reversed(whole)))
    evaluate(engine, TASK, METHOD, items(), run)
    assert (run / "results.jsonl").read_bytes() == b"".join(whole)
    assert lasting(run) == lasting(reference)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("method.spec", {"method": "graph-kv:rounds=2"}),
        ("seed", {"seed": 1}),
        ("edges", {"edges": "chain"}),
        ("decode.max_tokens", {"max_tokens": 7}),
        ("ablation", {"ablation": "order-random"}),
        ("prompt.question", {"task": replace(TASK, question="{question}")}),
        ("data.sha256", {"items": items()[::-1]}),
        ("limit", {"data": Data(tuple(items()), limit=5)}),
    ],
)
def test_another_run_is_not_mixed_in(reference, engine, field, change):
    given = {"task": TASK, "method": METHOD, "items": items(), **change}
    with pytest.raises(RunError, match=rf"holds a run with {field} = .*; give another folder") as error:
        evaluate(engine, given.pop("task"), given.pop("method"), given.pop("items"), reference, **given)
    assert "\n" not in str(error.value)


def test_the_model_may_have_moved_but_not_changed(reference, folder, tmp_path):
    run = copied(reference, tmp_path)
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    with Engine(models.load(str(moved))) as engine:
        evaluate(engine, TASK, METHOD, items(), run)
    changed = tmp_path / "changed"
    changed.mkdir()
    demo.write_model(changed, seed=3)
    with Engine(models.load(str(changed))) as engine, pytest.raises(RunError, match=r"model\.fingerprint"):
        evaluate(engine, TASK, METHOD, items(), run)


@pytest.mark.parametrize("finished", [True, False])
def test_another_chat_template_is_another_run(reference, folder, tmp_path, finished):
    run = copied(reference, tmp_path, summary=finished)
    changed = models.load(str(folder))
    changed.tokenizer.chat_template = changed.tokenizer.chat_template.replace("{{ m.role }}: ", "<{{ m.role }}> ")
    with Engine(changed) as engine, pytest.raises(RunError, match=r"with prompt\.chat_template_sha256 = "):
        evaluate(engine, TASK, METHOD, items(), run)


def test_a_run_that_does_not_say_its_chat_template_resumes(reference, engine, tmp_path):
    run = copied(reference, tmp_path, summary=False)
    config = json.loads((run / "config.json").read_text())
    del config["prompt"]["chat_template_sha256"]
    (run / "config.json").write_text(json.dumps(config))
    evaluate(engine, TASK, METHOD, items(), run)
    assert lasting(run) == lasting(reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}\n", "results.jsonl:1 is damaged"),
        (b"\x00\x00\x00\n", "results.jsonl:1 is damaged"),
        (b'{"id": "q77", "scores": {}, "timing": {}}\n', "unknown item 'q77'"),
        (b'{"id": "q1", "scores": {}, "timing": {}}\n' * 2, "results.jsonl:2 is a second line for item 'q1'"),
    ],
)
def test_damaged_results_are_an_error_that_says_where(reference, engine, tmp_path, text, message):
    run = copied(reference, tmp_path, summary=False)
    (run / "results.jsonl").write_bytes(text)
    with pytest.raises(RunError, match=message):
        evaluate(engine, TASK, METHOD, items(), run)
    assert (run / "results.jsonl").read_bytes() == text, "nothing was thrown away"


def test_results_of_an_unknown_run_are_left_alone(reference, engine, tmp_path):
    run = copied(reference, tmp_path)
    (run / "config.json").unlink()
    with pytest.raises(RunError, match=r"no config\.json"):
        evaluate(engine, TASK, METHOD, items(), run)


def test_two_processes_do_not_write_one_run(engine, tmp_path):
    with locked(tmp_path, RunError), pytest.raises(RunError, match="another process"):
        evaluate(engine, TASK, METHOD, items(), tmp_path)
    assert not (tmp_path / "config.json").exists()
    evaluate(engine, TASK, "full", items(1), tmp_path)


def test_a_full_disk_is_an_error_and_loses_nothing(reference, engine, tmp_path):
    """The file size limit stands for the disk's: writing beyond it fails in the middle of a line."""
    size = (reference / "results.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(RunError, match="run the same command again to continue"):
            evaluate(engine, TASK, METHOD, items(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    kept = lines(tmp_path)
    assert 3 <= len(kept) < 12 and (tmp_path / "results.jsonl").read_bytes().endswith(b"\n")
    assert engine.scheduler.idle, "nothing is left running"
    evaluate(engine, TASK, METHOD, items(), tmp_path)
    assert lasting(tmp_path) == lasting(reference)


def test_an_interrupt_leaves_the_engine_usable_and_the_run_resumable(reference, engine, tmp_path):
    def interrupt() -> None:
        while not (tmp_path / "results.jsonl").exists() or len(lines(tmp_path)) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(engine, TASK, METHOD, items(), tmp_path, window=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.scheduler.idle, "nothing is left running"
    assert not (tmp_path / "summary.json").exists()
    evaluate(engine, TASK, METHOD, items(), tmp_path)
    assert lasting(tmp_path) == lasting(reference)


def copied(reference: Path, tmp_path: Path, summary: bool = True) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "results.jsonl", "summary.json")[: 3 if summary else 2]:
        (run / name).write_bytes((reference / name).read_bytes())
    return run


# -- the prompt -------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + PLAIN
DROPS = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
NUMBERS = "{% for d in documents or [] %}Document {{ loop.index0 }}: {{ d.text }}\n{% endfor %}" + PLAIN


@pytest.mark.parametrize(
    ("template", "role"), [(PLAIN, "system"), (REFUSES, "user"), (DROPS, "user"), (NUMBERS, "system")]
)
def test_a_chat_template_is_used_whatever_it_does_to_system_messages(folder, template, role):
    tokenizer = models.load_tokenizer(folder)
    tokenizer.chat_template = template
    item = items(1)[0]
    made = prompt.build(TASK, item, tokenizer)
    assert made.segments == tuple(f"{document.text}\n\n" for document in item.documents)  # never with its rank
    whole = "".join((*made.prefix, *made.segments, made.query))
    question = TASK.question.format(question=item.question)
    if role == "system":
        assert whole.startswith(f"[system] {TASK.instruction}\n[user] {item.documents[0].text}")
        assert whole.endswith(f"{question}\n[assistant] ")
    else:
        assert whole.startswith(f"[user] {item.documents[0].text}")
        assert whole.endswith(f"{TASK.instruction}\n\n{question}\n[assistant] ")


def test_without_a_chat_template_the_parts_follow_each_other(folder):
    item = replace(items(1)[0], question="Why {braces}?")
    tokenizer = models.load_tokenizer(folder)
    tokenizer.chat_template = None
    made = prompt.build(TASK, item, tokenizer)
    assert made.prefix == (f"{TASK.instruction}\n\n",)
    assert made.query == "Question: Why {braces}?\nAnswer:"


# -- records ----------------------------------------------------------------------------------------------------------

SIMPLE = replace(
    TASK,
    name="simple",
    items=lambda rows: (Item(str(row["id"]), row["q"], (row["a"],), facts={"n": row.get("n", 0)}) for row in rows),
)
ROWS = [{"id": i, "q": f"who\u2028{i}?", "a": f"answer {i}"} for i in range(9)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_every_format_gives_the_same_items(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "rows.ndjson.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (tmp_path / "rows").write_bytes(jsonl(ROWS))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "object.json.gz").write_bytes(gzip.compress(json.dumps({"version": 1, "data": ROWS}).encode()))
    write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "folder" / "b").mkdir(parents=True)
    (tmp_path / "folder" / ".hidden").mkdir()
    (tmp_path / "folder" / ".hidden" / "x.jsonl").write_text("no JSON")
    (tmp_path / "folder" / "README.md").write_text("no data")
    (tmp_path / "folder" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:4]) + b"\n")
    (tmp_path / "folder" / "b" / "c.jsonl").write_bytes(jsonl(ROWS[4:]).rstrip(b"\n"))
    expected = read(SIMPLE, tmp_path / "rows.jsonl")
    assert len(expected.items) == 9 and expected.items[2].question == "who\u20282?"
    for name in ("rows.ndjson.gz", "rows", "list.json", "object.json.gz", "rows.parquet", "folder"):
        found = read(SIMPLE, tmp_path / name)
        assert (found.items, found.sha256) == (expected.items, expected.sha256), name
    streamed = replace(SIMPLE, hub=Hub(str(tmp_path / "folder"), split="train"))
    assert len(read(streamed, "hub", limit=3).items) == 3


def test_a_task_may_read_its_own_layout(tmp_path):
    task = replace(SIMPLE, read=lambda path: [{"id": path.name, "q": "?", "a": "x"}])
    assert read(task, tmp_path).items[0].id == tmp_path.name


def test_limit_and_shuffle(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ROWS) + b"what is never read can't be wrong\n")
    first = read(SIMPLE, path, 4)
    assert [item.id for item in first.items] == ["0", "1", "2", "3"] and first.limit == 4
    path.write_bytes(jsonl(ROWS))
    drawn = [read(SIMPLE, path, 4, shuffle=True, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0].items != drawn[2].items
    assert len({item.id for item in drawn[0].items}) == 4 and drawn[0].items != first.items
    assert len(read(SIMPLE, path, 99, shuffle=True).items) == 9
    assert drawn[0].sha256 == drawn[2].sha256 != first.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", jsonl(ROWS[:2]) + b"{oops}\n", r"x\.jsonl:3 is not JSON"),
        ("x.jsonl", b'{"id": 1, "q": "?", "a": "b", "n": NaN}\n', r"x\.jsonl:1 is not JSON.*NaN"),
        ("x.jsonl", b'{"id": 1, "q": "?", "a": "b", "n": 1e999}\n', r"x\.jsonl:1: item '1': n is inf"),
        ("x.jsonl", jsonl(ROWS[:1]) + b'{"id": 1, "q": "?"}\n', r"x\.jsonl:2: simple can't use .*: KeyError\('a'\)"),
        (
            "x.jsonl",
            jsonl([ROWS[0], ROWS[1], ROWS[0]]),
            r"x\.jsonl:3: the item's id '0' is used twice, as at .*x\.jsonl:1",
        ),
        ("x.jsonl", b'{"id": "", "q": "?", "a": "b"}\n', r"x\.jsonl:1: the item's id '' is empty"),
        ("x.jsonl", b'{"id": 1, "q": "?", "a": " "}\n', r"x\.jsonl:1: item '1' has no answer"),
        ("x.jsonl", b'{"id": 1, "q": "\\ud800", "a": "b"}\n', r"x\.jsonl:1: .*surrogate"),
        ("x.jsonl", b'{"id": 1, "q": "\xff"}\n', r"x\.jsonl:1 is not JSON in UTF-8"),
        ("x.jsonl", b"[1, 2]\n", r"x\.jsonl:1 holds a list; every record must be a JSON object"),
        ("x.jsonl", b"[" * 100_000 + b"\n", r"x\.jsonl:1 is not JSON"),
        ("x.jsonl", b"\n\n", "holds no items of simple"),
        ("x.json", b'{"rows": []}', r"neither a list of records nor one under 'data'"),
        ("x.json", b'{"data": [1]}', r"x\.json, record 1 holds a int; every record must be"),
        ("x.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], r"can't read .*x\.jsonl\.gz"),
        ("x.jsonl.gz", jsonl(ROWS), r"can't read .*x\.jsonl\.gz"),
        ("x.parquet", b"PAR1 no", r"can't read .*x\.parquet"),
        ("x.xlsx", b"", r"\.xlsx isn't supported"),
    ],
)
def test_bad_data_is_one_line_that_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message) as error:
        read(SIMPLE, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (None, "no data set on the hub; give --data PATH"),
        (Hub("nobody/nothing"), "can't get nobody/nothing from the hub: .*; or give --data PATH"),
        (Hub("nobody/nothing", file="x.jsonl"), "can't get nobody/nothing from the hub: .*; or give --data PATH"),
    ],
)
def test_the_hub_out_of_reach_is_one_line(hub, message):
    with pytest.raises(TaskError, match=message) as error:
        read(replace(SIMPLE, hub=hub), "hub")
    assert "\n" not in str(error.value)


def test_no_such_path(tmp_path):
    with pytest.raises(TaskError, match="there is no file or folder"):
        read(SIMPLE, tmp_path / "nothing")


# -- refused at once --------------------------------------------------------------------------------------------------


def test_a_task_with_an_unknown_metric_is_refused_before_anything_runs(engine, tmp_path):
    for task in (replace(TASK, metrics=("bleu",)), replace(TASK, extract="bleu")):
        with pytest.raises(TaskError, match="'bleu'"):
            evaluate(engine, task, METHOD, items(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "edges", "message"),
    [
        (items(2) * 2, None, "several items have the id 'q0'"),
        ([], None, "no items of island"),
        (items(2), "round", "edges 'round' aren't known"),
        (items(2), "star:3", "there is no segment 3"),
    ],
)
def test_what_would_fail_for_every_item_is_refused_at_once(engine, tmp_path, asked, edges, message):
    with pytest.raises(KVGraphError, match=message):
        evaluate(engine, TASK, METHOD, asked, tmp_path / "run", edges=edges)
    assert not (tmp_path / "run").exists()


def test_folders_of_different_methods_differ():
    specs = ["graph-kv", "graph-kv:rounds=2", "graph-kv:rounds=2,keep=all", "graph-kv:rounds=2,keep=all,", "a:b", "a_b"]
    specs += ["graph-kv: rounds=2", "a/b", "a:b:c", "a:b/c", "x" * 300, "x" * 301]
    names = list(map(slug, specs))
    assert names[:3] == ["graph-kv", "graph-kv_rounds=2", "graph-kv_rounds=2,keep=all"]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 120 for name in names)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    """The command line in this process: (exit status, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["eval", *map(str, words)])
        return end.value.code or 0, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def hotpot(tmp_path) -> Path:
    """Small questions in HotpotQA's schema."""
    context = [[f"Title {i}", [f"Fact {i}.", " More."]] for i in range(3)]
    rows = [
        {
            "_id": f"q{i}",
            "question": f"Which fact is number {i}?",
            "answer": f"Fact {i}",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [["Title 0", 0], ["Title 1", 0]],
            "context": context,
        }
        for i in range(6)
    ]
    path = tmp_path / "hotpot.jsonl"
    path.write_bytes(jsonl(rows))
    return path


def test_the_command_evaluates_methods_side_by_side(command, folder, hotpot, tmp_path):
    words = [
        "--task",
        "hotpotqa",
        "--method",
        "full",
        "--method",
        "graph-kv:rounds=1",
        "--model",
        folder,
        "--data",
        hotpot,
    ]
    words += ["--limit", 3, "--max-tokens", 4, "--out", tmp_path / "runs", "--no-check"]
    status, out, err = command(*words)
    assert status == 0, err
    rows = [line.split() for line in out.split("\n")[2:] if line]
    assert [row[:2] for row in rows] == [["hotpotqa", name] for name in ("full", "graph-kv:rounds=1")]
    assert out.split("\n")[0].split()[:3] == ["task", "method", "substring_em"]
    runs = [tmp_path / "runs" / "hotpotqa" / name for name in ("full", "graph-kv_rounds=1")]
    for run in runs:
        assert len(lines(run)) == 3
        summary = json.loads((run / "summary.json").read_text())
        assert summary["limit"] == 3 and summary["data"]["from"] == str(hotpot)
        assert (
            "memory" not in summary["timing"]["tokens"]["reused"]
            or summary["method"]["name"] == "full"
            or all(line["timing"]["document_tokens_computed"] for line in lines(run)[:1])
        ), "the second method must not live on the first one's memory"
    again = command(*words)
    assert again[:2] == (0, out), "a finished run says the same again"
    status, _, err = command(*words[:-1], "--seed", 5, "--no-check")
    assert status == 1 and "seed = 0, not 5" in err


def test_the_command_ends_cleanly_on_sigterm_and_goes_on(command, folder, hotpot, tmp_path):
    words = ["--task", "hotpotqa", "--method", "block", "--model", folder, "--data", hotpot, "--out", tmp_path / "runs"]
    words += ["--max-tokens", 60, "--no-check"]
    results = tmp_path / "runs" / "hotpotqa" / "block" / "results.jsonl"

    def stop() -> None:
        while not results.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    status, out, err = command(*words)
    assert status == 130 and "run the same command again to continue" in err and not out
    assert not (results.parent / "summary.json").exists()
    assert command(*words)[0] == 0
    assert [line["id"] for line in lines(results.parent)] == [f"q{i}" for i in range(6)]


def test_the_list_has_every_task_and_method(command):
    from kvgraph.data.tasks import TASKS

    status, out, _ = command("--list")
    assert status == 0
    for name in (*TASKS, *methods.METHODS, *methods.PRESETS):
        assert f"\n{name} " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task nq", "eval needs --method"),
        ("--method full", "eval needs --task"),
        ("--task nq --method full --out x", "eval needs --model"),
        ("--task nq --method full --model x", "eval needs --out"),
        ("--task what --method full --model x --out y", "what"),
        ("--task nq --method what --model x --out y", "there is no method 'what'"),
        ("--task nq --method full --method full --model x --out y", "same --method is given twice"),
        ("--task nq --method full --model x --out y --edges chain", "none of these methods reads edges: full"),
        ("--task nq --method full --model x --out y --data /no/such", "there is no file or folder /no/such"),
        ("--task nq --method full --model x --out y --limit 0", "limit"),
    ],
)
def test_mistakes_are_one_line(command, words, message):
    status, out, err = command(*words.split())
    assert status in (1, 2) and not out
    assert message in err and len(err.strip().split("\n")) == 1
