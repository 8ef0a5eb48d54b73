"""The command line: every command, every mistake a person can make, interrupted work, and the documentation."""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import typer

from commands import Command
from kvgraph import Engine, __version__, demo, methods, models
from kvgraph.cli import app, common, main
from kvgraph.cli import world_demo as demo_command
from kvgraph.data import corpus, prompt
from kvgraph.data.tasks.world import WORLD_CHUNKS, WORLD_HOPS
from kvgraph.data.world import tokenizer
from kvgraph.data.world.world import records
from soak import SOAK

ROOT = Path(__file__).parents[2]
# The command line sets this before transformers is imported; in this process it may have been imported already.
transformers.utils.logging.disable_progress_bar()

RECORDS = "records/*/*.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> str:
    """Three short documents, one of them empty, as JSON Lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        {"id": f"d{i}", "title": f"T{i}", "text": text} for i, text in enumerate(("one fact", "two facts", "three"))
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def figures(line: str) -> dict[str, int]:
    """{"computed": 12, "reused": 0, ...} of a line that says "12 tokens computed, 0 reused"."""
    return {
        what: int(n.replace(",", ""))
        for n, what in re.findall(r"([\d,]+) (?:tokens? )?(document|computed|reused)", line)
    }


def ask(run, model, documents, *more) -> dict:
    code, out, err = run("ask", model, "why?", "--documents", documents, "--max-tokens", 6, "--json", *more)
    assert code == 0, err
    return json.loads(out)


# -- encode and ask ---------------------------------------------------------------------------------------------------


def test_encode_then_ask_computes_no_document(run, model, documents, tmp_path):
    store = tmp_path / "kv"
    block = ["--method", "block"]
    code, out, err = run("encode", model, documents, "--store", store, *block)
    tokens = sum(len(d.text) for d in corpus.load(documents))  # one token a byte
    assert code == 0
    assert figures(out) == {"document": 3, "computed": tokens, "reused": 0}
    assert err.count("\n") == 1 and "doesn't declare tuning for 'block'" in err
    assert len(list(store.glob(RECORDS))) == 3

    code, out, _ = run("encode", model, documents, "--store", store, *block)
    assert figures(out) == {"document": 3, "computed": 0, "reused": tokens}

    stored = ask(run, model, documents, "--store", store, *block)
    assert stored["usage"]["document_tokens_computed"] == 0
    assert stored["usage"]["reused_tokens"] == {"disk": tokens}
    unstored = ask(run, model, documents, *block)
    assert unstored["usage"]["document_tokens_computed"] == tokens
    assert stored["token_ids"] == unstored["token_ids"]


def test_ask_streams_the_answer_and_says_what_it_cost(run, model, documents):
    code, out, err = run("ask", model, "why?", "--documents", documents, "--max-tokens", 6, "--method", "full")
    assert code == 0
    assert out.removesuffix("\n") == ask(run, model, documents, "--method", "full")["text"]
    assert re.fullmatch(r"\[prompt .* computed .* reused; first token .*; 6 generated.*; length\]\n", err)


def test_picked_documents_keep_their_order_and_ids_beat_numbers(run, model, documents):
    by_id = ask(run, model, documents, "--pick", "d2,d0")
    assert by_id == ask(run, model, documents, "--pick", "2", "--pick", "0") | {"usage": by_id["usage"]}
    assert by_id["token_ids"] != ask(run, model, documents, "--pick", "d0,d2")["token_ids"]


def test_edges_and_method_fields_reach_the_plan(run, model, documents):
    plain = ask(run, model, documents, "--method", "graph-kv")
    read = ask(run, model, documents, "--method", "graph-kv:rounds=2,layout=tight", "--edges", "d0>d1,1>0")
    assert plain["usage"]["document_tokens_computed"] < read["usage"]["document_tokens_computed"]


def test_sampling_options_and_stop_reach_the_sampler(run, model, documents):
    drawn = ["--temperature", 5, "--seed", 3, "--top-k", 200, "--top-p", 0.99, "--min-p", 0.0001]
    assert ask(run, model, documents, *drawn)["token_ids"] == ask(run, model, documents, *drawn)["token_ids"]
    assert ask(run, model, documents, *drawn)["token_ids"] != ask(run, model, documents)["token_ids"]
    text = ask(run, model, documents)["text"]
    assert ask(run, model, documents, "--stop", text[2:4])["text"] == text[: text.index(text[2:4])]


def test_a_prefix_is_encoded_with_the_corpus(run, model, documents, tmp_path):
    store = tmp_path / "kv"
    run("encode", model, documents, "--store", store, "--prefix", r"Read:\n", "--method", "full")
    assert len(list(store.glob(RECORDS))) == 4
    usage = ask(run, model, documents, "--store", store, "--prefix", r"Read:\n", "--method", "full", "--pick", "d1")[
        "usage"
    ]
    assert usage["document_tokens_computed"] == 0


def test_dry_run_writes_nothing_and_its_figures_come_true(run, model, documents, tmp_path):
    store = tmp_path / "kv"
    code, out, _ = run("encode", model, documents, "--store", store, "--dry-run")
    assert code == 0 and not store.exists()
    tokens = int(re.search(r"tokens +([\d,]+)", out)[1])
    assert "KV on disk" in out and "time        about" in out and "nothing was written" in out
    _, out, _ = run("encode", model, documents, "--store", store)
    assert figures(out)["computed"] == tokens


def test_a_codec_makes_a_store_small_and_is_found_by_its_own_commands(run, model, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "some words " * 20}) + "\n" for i in range(3)))
    store, sizes = tmp_path / "kv", {}
    for codec in ("raw", "kivi:bits=2"):
        options = ["--store", store, "--template", "{text}", "--codec", codec, "--method", "block"]
        words = ["encode", model, path, *options]
        _, said, _ = run(*words, "--dry-run")
        assert figures(run(*words)[1])["reused"] == 0 and figures(run(*words)[1])["computed"] == 0
        sizes[codec] = sum(f.stat().st_size for f in store.glob(RECORDS)) - sum(sizes.values())
        unit = {"KiB": 1 << 10, "MiB": 1 << 20}
        amount, name = re.search(r"KV on disk +([\d.]+) (\w+)", said).groups()
        assert sizes[codec] == pytest.approx(float(amount) * unit[name], rel=0.1)
        usage = ask(run, model, path, *options)["usage"]
        assert usage["document_tokens_computed"] == 0
    assert sizes["raw"] > 8 * sizes["kivi:bits=2"]
    assert run("store", "ls", "--store", store)[1].count("kivi:bits=2") == 3
    code, _, err = run("encode", model, path, "--store", store, "--template", "{text}", "--codec", "gzip")
    assert code == 1 and "there is no codec 'gzip'" in err


def test_empty_and_too_long_documents_are_named_and_skipped(run, model, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ""}\n{"text": "' + "x" * 40000 + '"}\n')
    code, out, err = run("encode", model, path, "--store", tmp_path / "kv", "--template", "{text}")
    assert code == 1
    assert figures(out) == {"document": 1, "computed": 4, "reused": 0}
    assert f"skipped {path}:2: no tokens" in err
    assert f"skipped {path}:3: 40,000 tokens don't fit" in err


def test_a_corpus_larger_than_the_budget_is_encoded(run, model, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:03} " + "y" * 60}) + "\n" for i in range(20)))
    budget = 3 * 64 * demo.LAYERS * 2 * demo.KV_HEADS * demo.HEAD_DIM * 4  # three documents of 64 tokens
    code, out, err = run(
        "encode", model, path, "--store", tmp_path / "kv", "--template", "{text}", "--kv-budget", budget
    )
    assert code == 0, err
    assert figures(out) == {"document": 20, "computed": 20 * 64, "reused": 0}
    assert len(list((tmp_path / "kv").glob(RECORDS))) == 20


def test_an_encode_that_was_killed_goes_on_where_it_was(run, model, tmp_path):
    path, store = tmp_path / "c.jsonl", tmp_path / "kv"
    count = 300  # more than are encoded between the third record and the signal
    texts = [f"{i:03} " + "z" * 100 for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["encode", model, str(path), "--store", str(store), "--template", "{text}"]
    for signal_, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(list(store.glob(RECORDS)))
        process = Command(*words)
        while len(list(store.glob(RECORDS))) < before + 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal_)
        assert process.wait() == code, process.stderr
        err = process.stderr
        assert "Traceback" not in err and "Loading" not in err
    assert "run the same command again" in err
    left = len(list(store.glob(RECORDS)))
    assert 6 <= left < count
    code, out, _ = run(*words)
    done = figures(out)
    assert code == 0 and done["reused"] >= left * 104 and done["computed"] + done["reused"] == count * 104
    assert figures(run(*words)[1]) == {"document": count, "computed": 0, "reused": count * 104}
    assert run("store", "verify", "--store", store)[0] == 0


# -- corpora ----------------------------------------------------------------------------------------------------------


def test_json_lines_split_on_newlines_only_and_may_be_compressed(tmp_path):
    rows = [{"id": 7, "title": "a\u2028b", "text": "x\u0085y"}, {"_id": "k", "title": "{t}", "text": 5}]
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\r\n\n"
    (tmp_path / "c.jsonl").write_bytes(data)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("c.jsonl", "c.jsonl.gz"):
        found = corpus.load(tmp_path / name)
        assert [d.text for d in found] == ["a\u2028b\nx\u0085y\n", "{t}\n5\n"]
        assert [d.name for d in found] == ["7", "k"]
        assert found[1].where == f"{tmp_path / name}:2"
    assert corpus.load(tmp_path / "c.jsonl", "{{{title}}}", limit=1)[0].text == "{a\u2028b}"


def test_a_folder_is_its_files_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("b/2.txt", "two"), ("a.md", "one\r\n"), (".hidden", "no"), ("b/.x", "no")):
        (tmp_path / name).write_bytes(text.encode())
    found = corpus.load(tmp_path)
    assert [(d.name, d.text) for d in found] == [("a.md", "one\r\n"), ("b/2.txt", "two")]
    assert corpus.load(tmp_path / "a.md", "{title}: {text}")[0].text == "a: one\r\n"


@pytest.mark.parametrize(("text", "size"), [("1000", 1000), ("4GiB", 4 << 30), ("4g", 4 << 30), ("1.5 kB", 1500)])
def test_sizes(text, size):
    assert common.parse_size(text) == size


# -- the other commands -----------------------------------------------------------------------------------------------


def test_explain_shows_the_plan_without_weights(run, model, documents, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    words = ["--documents", documents, "--method", "graph-kv", "--edges", "chain", "--prefix", "P"]
    for source in ([tmp_path], ["--tokenizer", tmp_path]):
        code, out, err = run("explain", *source, *words)
        assert code == 0, err
        assert "d2 · round 1" in out and "highest position" in out
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"tokens": [5, 6, 7]}\n{"tokens": [8]}\n')
    code, out, _ = run("explain", "--ids", "--documents", ids, "--template", "{tokens}", "--question", "9 9")
    assert code == 0 and re.search(r"query +2 +4–5 +prompt", out)


def test_check_prints_the_gate_and_the_price_of_a_method(run, model, tmp_path):
    code, out, _ = run("check", model)
    assert code == 0 and "composes exactly" in out and re.search(r"^chain .* yes$", out, re.M)
    data = tmp_path / "items.jsonl"
    item = {"question": "why?", "answer": "because", "documents": ["one", {"title": "t", "text": "two"}]}
    data.write_text(json.dumps(item) + "\n")
    code, out, _ = run("check", model, "--method", "block", "--data", data, "--json")
    found = json.loads(out)
    assert code == 0 and found["passed"] and len(found["cases"]) >= 7
    assert found["quality"]["items"] == 1 and found["quality"]["tokens"] == 7
    assert found["quality"]["nll"] != found["quality"]["full_nll"]
    code, out, _ = run("check", model, "--method", "full", "--data", data)
    assert "difference +0.0000 nats per token, perplexity ×1.000: under full these answers are as likely" in out


def test_check_measures_your_own_documents_with_nothing_prepared(run, model, tmp_path):
    words = [
        f"The {name} keeper of light {n} keeps oil for {n + 3} nights." for n, name in enumerate(["old", "new"] * 20)
    ]
    for number in range(12):
        (tmp_path / f"page-{number}.txt").write_text(" ".join(words[number:] + words[:number]))
    code, out, err = run("check", model, "--method", "block", "--documents", tmp_path, "--limit", 1)
    assert code == 0 and "composes exactly" in out and "recitations, block" in out, out + err


def test_a_model_that_fails_the_gate_is_refused(run, model, documents, monkeypatch, tmp_path):
    from kvgraph.checks import gate as check

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # so that no earlier pass is remembered
    monkeypatch.setattr(check, "TOLERANCE", dict.fromkeys(check.TOLERANCE, -1.0))
    code, out, _ = run("check", model)
    assert code == 1 and "does NOT compose exactly" in out and " NO\n" in out
    code, _, err = run("ask", model, "q", "--documents", documents)
    assert code == 1 and "fails the gate" in err and err.count("\n") == 1
    assert run("ask", model, "q", "--documents", documents, "--no-check", "--max-tokens", 1)[0] == 0


def test_store_commands(run, model, documents, tmp_path):
    store = tmp_path / "kv"
    run("encode", model, documents, "--store", store)
    code, out, _ = run("store", "ls", "--store", store)
    assert code == 0
    keys = re.findall(r"^([0-9a-f]{16}) ", out, re.M)
    assert len(keys) == 3 and "KiB" in out
    _, out, _ = run("store", "stats", "--store", store)
    assert out.splitlines()[-1].startswith("3 records, ")
    assert run("store", "verify", "--store", store)[:2] == (0, run("store", "verify", "--store", store)[1])

    bad = sorted(store.glob(RECORDS))[0]
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    code, out, _ = run("store", "verify", "--store", store)
    assert code == 1 and f"damaged {bad.stem}" in out and "2 records are good" in out and bad.exists()
    code, out, _ = run("store", "verify", "--store", store, "--repair")
    assert code == 1 and f"moved aside {bad.stem}" in out and "2 records are good" in out and not bad.exists()
    assert run("store", "stats", "--store", store)[1].splitlines()[-1].endswith("; 1 quarantined")

    key = sorted(store.glob(RECORDS))[0].stem
    assert run("store", "pin", "--store", store, key[:12])[1] == f"pinned {key}\n"
    assert "1 (" in run("store", "stats", "--store", store)[1].split("pinned")[1]
    assert run("store", "unpin", "--store", store, key[:12])[1] == f"unpinned {key}\n"
    assert run("store", "rm", "--store", store, key[:12])[:2] == (0, f"removed {key}\n")
    assert run("store", "gc", "--store", store, "--older-than", "7d")[1].startswith("removed 0 records")
    assert run("store", "gc", "--store", store, "--max-size", "1B")[1].startswith("removed 1 records")
    run("encode", model, documents, "--store", store)
    assert run("store", "rm", "--store", store, "--all", "--yes")[1].startswith("removed 3 records")
    assert not list(store.glob(RECORDS))


def test_removing_all_records_asks_first(run, model, documents, tmp_path, monkeypatch):
    store = tmp_path / "kv"
    run("encode", model, documents, "--store", store)
    for answer in ("n\n", ""):
        monkeypatch.setattr("sys.stdin", __import__("io").StringIO(answer))
        code, _, err = run("store", "rm", "--store", store, "--all")
        assert code == 1 and "nothing was" in err.splitlines()[-1]
    assert len(list(store.glob(RECORDS))) == 3


def test_bench_measures_cold_and_warm(run, model):
    sizes = ["--documents", 2, "--length", 20, "--query", 4, "--new-tokens", 2, "--repeats", 1, "--no-check"]
    code, out, err = run("bench", model, *sizes, "--method", "full", "--method", "graph-kv", "--edges", "all", "--json")
    assert code == 0, err
    full, graph = json.loads(out)["rows"]
    assert (full["cold_computed"], full["warm_computed"], full["warm_reused"]) == (44, 4, 40)
    assert (graph["cold_computed"], graph["warm_computed"], graph["warm_reused"]) == (84, 4, 80)
    code, out, err = run("bench", model, *sizes[:-1], "--method", "block", "--threads", 1)  # with the gate
    assert code == 0 and re.search(r"^block +44 .* 4 +40 ", out, re.M), err
    code, out, err = run("bench", model, *sizes, "--method", "kvlink:links=1,link_start=259", "--json")
    (row,) = json.loads(out)["rows"]
    assert row["method"] == "kvlink:links=1,link_start=259" and row["warm_computed"] == 6, err  # a link a document


CORE_ONLY = """
import sys
from dataclasses import replace
sys.modules |= dict.fromkeys(("datasets", "fastapi", "matplotlib", "numba", "peft", "pyarrow", "rouge_score", "scipy"))
from kvgraph.cli import main, world_demo as demo
demo.EACH = 1
demo.DOCUMENTS, demo.SHUFFLED_CHUNKS = (replace(w, count=1) for w in (demo.DOCUMENTS, demo.SHUFFLED_CHUNKS))
try:
    main(["demo", "--world"])
finally:
    assert "kvgraph.eval" not in sys.modules
"""


@pytest.fixture
def shipped() -> Path:
    """The folder of the model that ships with the package."""
    return demo.model()


@pytest.mark.slow
def test_demo_runs_to_the_end_without_any_extra(shipped):
    done = subprocess.run([sys.executable, "-c", CORE_ONLY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    checks = [line for line in done.stdout.splitlines() if re.match(r" +[✓✗] ", line)]
    assert len(checks) == 5 and all("✓" in line for line in checks)
    rows = re.findall(r"^(\S+) +(cold|warm|restart) .* \d/1 +\d/1 +(\d+) +(\d+) +(\d+) +[\d.]+ m?s$", done.stdout, re.M)
    assert [row[:2] for row in rows] == [(m, run) for m in demo_command.SPECS for run in demo_command.RUNS]
    for cold, warm, restart in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        assert int(cold[2]) > 2 * int(warm[2]) == 2 * int(restart[2])  # documents are computed once
        assert int(warm[3]) > 50 and int(restart[4]) > 50 and cold[4] == warm[4] == "0"
    assert max(map(len, done.stdout.splitlines())) <= 104


@pytest.mark.slow
def test_the_demo_shows_what_edges_are_for(shipped):
    model = models.load(shipped, dtype="float32")
    chunks = demo_command._asked(demo_command.SHUFFLED_CHUNKS)
    with Engine(model) as engine:
        right = {
            name: demo_command._right(chunks, [demo_command._answer(engine, methods.get(name), c) for c in chunks])
            for name in ("full", "block", "graph-kv")
        }
    assert right["graph-kv"] >= 17 and max(right["full"], right["block"]) <= 12


def test_the_demo_asks_as_an_evaluation_does(tmp_path):
    tokenizer.write(tmp_path)
    model = SimpleNamespace(tokenizer=models.load_tokenizer(tmp_path))
    for task, world in ((WORLD_HOPS, demo_command.DOCUMENTS), (WORLD_CHUNKS, demo_command.SHUFFLED_CHUNKS)):
        items = task.items(records(world))
        for asked, item in zip(demo_command._asked(world), items, strict=True):
            assert (asked.question.answer,) == item.references
            for method, edges in (("full", ()), ("graph-kv", item.links)):
                there = prompt.build(task, item, model.tokenizer).graph(edges)
                assert asked.graph(model, methods.get(method)) == there


def test_a_demo_without_its_model_is_one_clear_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    code, out, err = run("demo", "--world")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert f"lacks config.json in {tmp_path}" in err and "install kvgraph again" in err


def test_a_difference_ends_the_demo_with_an_error(run, monkeypatch, shipped):
    small = [replace(world, count=1) for world in (demo_command.DOCUMENTS, demo_command.SHUFFLED_CHUNKS)]
    monkeypatch.setattr(demo_command, "EACH", 1)
    monkeypatch.setattr(demo_command, "DOCUMENTS", small[0])
    monkeypatch.setattr(demo_command, "SHUFFLED_CHUNKS", small[1])
    monkeypatch.setattr(demo_command, "TOLERANCE", -1.0)
    code, out, err = run("demo", "--world")
    assert code == 1 and "found a difference" in err
    assert len(re.findall(r"✗ +\S+ +logits differ", out)) == 4


def test_the_shipped_model_is_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for name in (*demo.MODEL_FILES, "README.md"):
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_demo_documents_cite_each_other():
    names = [d.name for d in demo.documents()]
    assert 8 <= len(names) <= 12 and len(set(names)) == len(names)
    assert all({source, reader} <= set(names) for source, reader in demo.citations())
    assert len(demo.questions()) >= 3


@pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
def test_the_example_with_citations_computes_documents_once(model, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "citations.py"))
    example["main"](model, str(tmp_path))
    computed = re.findall(r"(\d+) document tokens computed", capsys.readouterr().out)
    assert int(computed[0]) > 4000 and len(computed) > 2 and set(computed[1:]) == {"0"}


# -- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    (2, "No such command", ["nonsense"]),
    (2, "--nonsense", ["encode", "{model}", "{documents}", "--nonsense"]),
    (2, "needs --documents", ["ask", "{model}"]),
    (2, "needs --store", ["encode", "{model}", "{documents}"]),
    (2, "isn't a size", ["encode", "{model}", "{documents}", "--store", "{tmp}/kv", "--kv-budget", "lots"]),
    (2, "isn't a duration", ["store", "gc", "--store", "{tmp}", "--older-than", "7"]),
    (2, "say what to remove", ["store", "gc", "--store", "{tmp}"]),
    (2, "give KEYs", ["store", "rm", "--store", "{tmp}"]),
    (2, "belong together", ["check", "{model}", "--method", "block"]),
    (2, "give one of MODEL", ["explain", "--documents", "{documents}"]),
    (1, "no file or folder", ["encode", "{model}", "{tmp}/none.jsonl", "--store", "{tmp}/kv"]),
    (1, "there is no folder", ["ask", "./no/such/model", "q", "--documents", "{documents}"]),
    (1, "no config.json", ["ask", "{tmp}", "q", "--documents", "{documents}"]),
    (1, "bad.jsonl:2 is not JSON", ["ask", "{model}", "q", "--documents", "{tmp}/bad.jsonl", "--template", "{{a}}"]),
    (1, "list.jsonl:1 holds a list", ["ask", "{model}", "q", "--documents", "{tmp}/list.jsonl"]),
    (1, "has no field 'titel'; it has id, title, text", ["encode", "{model}", "{documents}", "--store", "{tmp}/kv", "--template", "{{titel}}"]),
    (1, "template", ["encode", "{model}", "{documents}", "--store", "{tmp}/kv", "--template", "{{title"]),
    (1, "plain name of a field", ["ask", "{model}", "q", "--documents", "{documents}", "--template", "{{title!r}}"]),
    (1, "holds no documents", ["ask", "{model}", "q", "--documents", "{tmp}/empty.jsonl"]),
    (1, "not UTF-8", ["ask", "{model}", "q", "--documents", "{tmp}/latin.txt"]),
    (1, "can't read", ["ask", "{model}", "q", "--documents", "{tmp}/broken.jsonl.gz", "--template", "{{a}}"]),
    (1, "no document '9'", ["ask", "{model}", "q", "--documents", "{documents}", "--pick", "0,9"]),
    (2, "doesn't name a document", ["ask", "{model}", "q", "--documents", "{documents}", "--pick", " ,"]),
    (1, "picked twice", ["ask", "{model}", "q", "--documents", "{documents}", "--pick", "0,d0"]),
    (1, "no method 'blok'", ["ask", "{model}", "q", "--documents", "{documents}", "--method", "blok"]),
    (1, "no field 'bond'", ["ask", "{model}", "q", "--documents", "{documents}", "--method", "graph-kv:bond=3"]),
    (1, "isn't FIELD=VALUE", ["ask", "{model}", "q", "--documents", "{documents}", "--method", "graph-kv:rounds"]),
    (1, "ignores edges", ["ask", "{model}", "q", "--documents", "{documents}", "--edges", "all"]),
    (1, "edges 'ring'", ["ask", "{model}", "q", "--documents", "{documents}", "--method", "graph-kv", "--edges", "ring"]),
    (1, "no segment named 'd7'", ["ask", "{model}", "q", "--documents", "{documents}", "--edges", "d0>d7"]),
    (1, "query is empty", ["ask", "{model}", "", "--documents", "{documents}"]),
    (1, "temperature", ["ask", "{model}", "q", "--documents", "{documents}", "--temperature", "-1"]),
    (1, "budget", ["ask", "{model}", "q", "--documents", "{documents}", "--kv-budget", "1kB"]),
    (1, "device", ["ask", "{model}", "q", "--documents", "{documents}", "--device", "toaster"]),
    (1, "dtype", ["ask", "{model}", "q", "--documents", "{documents}", "--dtype", "int7"]),
    (1, "empty.jsonl", ["ask", "{model}", "q", "--documents", "{documents}", "--store", "{tmp}/empty.jsonl/kv"]),
    (1, "there is no store", ["store", "ls", "--store", "{tmp}/none"]),
    (1, "isn't a store", ["store", "verify", "--store", "{tmp}"]),
    (1, "can't read", ["check", "{model}", "--method", "block", "--data", "{tmp}/none.jsonl"]),
    (1, 'needs "question"', ["check", "{model}", "--method", "block", "--data", "{documents}"]),
    (1, "token ids", ["explain", "--ids", "--documents", "{documents}"]),
    (1, "token ids", ["explain", "--ids", "--documents", "{tmp}/ids.txt", "--question", "9" * 5000]),
    (1, "no vocabulary", ["explain", "--ids", "--documents", "{tmp}/ids.txt", "--question", "99999999999"]),
    (1, "query is empty", ["explain", "--ids", "--documents", "{tmp}/ids.txt", "--question", ""]),
    (1, "query is empty", ["explain", "{model}", "--documents", "{documents}", "--question", ""]),
    (2, "give one of", ["explain", "--ids", "--documents", "{tmp}/ids.txt", "--tokenizer", ""]),
    (1, "there is no folder ./nomodel", ["explain", "./nomodel", "--documents", "{documents}"]),
    (1, "names no field", ["ask", "{model}", "q", "--documents", "{documents}", "--template", ""]),
    (1, "ids.jsonl:1: field 't' is [5], not text", ["encode", "{model}", "{tmp}/ids.jsonl", "--dry-run", "--template", "{{t}}"]),
    (1, "segment 0 ({documents}:1)", ["encode", "{model}", "{documents}", "--dry-run", "--method", "graph-kv:band=5"]),
    (1, "no document '99999", ["ask", "{model}", "q", "--documents", "{documents}", "--pick", "9" * 5000]),
    (1, "edges 'top-k:999", ["ask", "{model}", "q", "--documents", "{documents}", "--edges", "top-k:" + "9" * 5000]),
    (1, "named '99999", ["ask", "{model}", "q", "--documents", "{documents}", "--edges", "9" * 5000 + ">0"]),
    (1, "rounds must be", ["ask", "{model}", "q", "--documents", "{documents}", "--method", "graph-kv:rounds=" + "9" * 5000]),
    (2, "isn't a size", ["store", "gc", "--store", "{tmp}", "--max-size", "9" * 400]),
    (2, "isn't a size", ["store", "gc", "--store", "{tmp}", "--max-size", "9" * 18 + "TiB"]),
    (2, "isn't a duration", ["store", "gc", "--store", "{tmp}", "--older-than", "9" * 400 + "d"]),
    (1, "no method ''", ["check", "{model}", "--method", "", "--data", "{documents}"]),
    (1, "no method 'full,block'", ["bench", "{model}", "--method", "full,block"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "says", "words"), MISTAKES, ids=[f"{m[2][0]}: {m[1]}" for m in MISTAKES])
def test_a_mistake_is_one_clear_line(run, model, documents, tmp_path, code, says, words):
    (tmp_path / "bad.jsonl").write_text('{"a": "x"}\n{"a": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "ids.txt").write_text("5 6")
    (tmp_path / "ids.jsonl").write_text('{"t": [5]}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-12])
    names = {"model": model, "documents": documents, "tmp": tmp_path}
    found, out, err = run(*(word.format(**names) for word in words))
    lines = [line for line in err.splitlines() if "warning: this model doesn't declare tuning" not in line]
    assert found == code
    assert len(lines) == 1 and lines[0].startswith("kvgraph: ") and says.format(**names) in lines[0], err
    assert "Traceback" not in out + err and "unexpected" not in err


def test_a_store_that_cannot_keep_records_ends_encode_and_not_ask(run, model, documents, tmp_path):
    """With files limited to 10 kB no record can be written: encode is pointless then, an answer isn't."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        encoded = run("encode", model, documents, "--store", tmp_path / "kv", "--method", "full")
        asked = run(
            "ask",
            model,
            "q",
            "--documents",
            documents,
            "--store",
            tmp_path / "kv",
            "--method",
            "full",
            "--max-tokens",
            2,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert encoded[0] == 1 and encoded[2].count("\n") == 1 and "can't keep a record" in encoded[2]
    assert asked[0] == 0 and "warning: the store can't keep records" in asked[2]


def test_debug_shows_the_traceback(model, documents):
    with pytest.raises(corpus.CorpusError):
        main(["--debug", "ask", model, "q", "--documents", "nowhere.jsonl"])


def test_a_template_field_may_be_token_ids_only_where_ids_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"t": [1, 2]}\n{"t": ["x"]}\n')
    assert corpus.load(path, "{t}", limit=1, token_ids=True)[0].text == "[1, 2]"
    with pytest.raises(corpus.CorpusError, match=r"c.jsonl:1: field 't' is \[1, 2\], not text"):
        corpus.load(path, "{t}")
    with pytest.raises(corpus.CorpusError, match=r"c.jsonl:2: field 't' is \[\"x\"\], not text"):
        corpus.load(path, "{t}", token_ids=True)


def test_an_id_of_several_documents_cannot_be_picked_but_others_can(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": "x"}) + "\n" for name in ("a", "b", "a")))
    documents = corpus.load(path, "{text}")
    with pytest.raises(corpus.CorpusError, match=r"c.jsonl:1 and .*c.jsonl:3 both have the id 'a'"):
        corpus.pick(documents, ["a"])
    assert [d.where for d in corpus.pick(documents, ["b", "2"])] == [f"{path}:2", f"{path}:3"]


def test_garbage_is_looked_for_as_usual_after_a_command(run):
    before = gc.get_threshold()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvgraph.cli._open_streams", lambda: seen.append(gc.get_threshold()))
        run("--version")
    assert seen and seen[0][0] > 1_000_000
    assert gc.get_threshold() == before


def test_the_version_is_printed_without_a_command(run):
    assert run("--version") == (0, f"kvgraph {__version__}\n", "")


# -- help and documentation -------------------------------------------------------------------------------------------


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its full name, as typer builds it."""
    found = {}

    def walk(command, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}".strip())
        if not hasattr(command, "commands") or (path and command.invoke_without_command):
            found[path] = command

    walk(typer.main.get_command(app), "")
    return found


def test_help_of_every_command_has_an_example_and_imports_no_torch():
    program = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from kvgraph.cli import main
shown = {}
for name in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out:
        try:
            main([*name.split(), "--help"])
        except SystemExit as end:
            assert not end.code, name
    shown[name] = out.getvalue()
assert not {"torch", "transformers", "safetensors"} & set(sys.modules), "heavy imports"
print(json.dumps(shown))
"""
    names = ["", *commands(), "store"]
    done = subprocess.run([sys.executable, "-c", program, json.dumps(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, text in json.loads(done.stdout).items():
        assert re.search(rf"^    kvgraph {name}", text, re.M), f"the help of {name!r} has no example"
        assert "\\b" not in text


# -- environments -----------------------------------------------------------------------------------------------------


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """A shell's line in which `kvgraph` is the command."""
    here = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment}
    line = 'kvgraph() { "$PYTHON" -m kvgraph.cli "$@"; }; ' + line
    return subprocess.run(["sh", "-c", line], env=here, capture_output=True, timeout=120)


def test_closed_streams_are_no_error(model, documents, tmp_path):
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-") if SOAK else (">&-", "<&- >&- 2>&-"):
        assert shell(f"kvgraph --version {closed}").returncode == 0
    words = f"{model} --documents {documents}"
    if not SOAK:  # without a tokenizer, and the seconds that its imports take
        (tmp_path / "ids.jsonl").write_text('{"tokens": [5, 6, 7]}\n')
        words = f"--ids --documents {tmp_path}/ids.jsonl --template '{{tokens}}'"
    done = shell(f"kvgraph store stats --store /nowhere 2>&-; echo $?; kvgraph explain {words} 2>&-")
    assert done.stdout.decode().startswith("1\n#") and not done.stderr


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path):
    """What a library prints would go into it."""
    script = "from kvgraph.cli import _open_streams; _open_streams(); import sys; f = open(sys.argv[1], 'w'); print(f.fileno(), file=f)"
    shell(f'"$PYTHON" -c "{script}" {tmp_path}/f <&- >&- 2>&-')
    assert int((tmp_path / "f").read_text()) > 2


def test_characters_that_the_output_lacks_are_replaced(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "中é", "text": "5 17"}))
    done = shell(
        f"kvgraph explain --ids --documents {tmp_path}/c.jsonl --template '{{text}}'", PYTHONIOENCODING="latin-1"
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "?é" in done.stdout.decode("latin-1")


def test_python_without_docstrings_is_named_in_one_line(model, documents):
    done = shell(f"kvgraph explain {model} --documents {documents}", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1) and b"PYTHONOPTIMIZE=2" in done.stderr
    assert shell("kvgraph --version", PYTHONOPTIMIZE="2").returncode == 0


def test_half_a_surrogate_pair_is_named(run, model, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"title": "T", "text": "a \\ud83d b"}')
    for command in (("explain", model), ("ask", model, "why")):
        code, _, err = run(*command, "--documents", path)
        assert code == 1 and err.count("\n") == 1 and "half of a surrogate pair" in err


def test_tables_lists_and_loud_suffixes_are_corpora(run, model, tmp_path):
    """Also behind a link to a folder: each row is a document, not each file."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.JSONL").write_text(
        '{"id": "a", "title": "T", "text": "x"}\n{"id": "b", "title": "T", "text": "y"}\n'
    )
    (tmp_path / "there" / "b.json").write_text(
        '[{"id": "c", "title": "T", "text": "x"}, {"id": "d", "title": "T", "text": "y"}]'
    )
    (tmp_path / "there" / "c.CSV").write_text("id,title,text\ne,T,x\nf,T,y\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "docs").symlink_to(tmp_path / "there")
    assert [d.name for d in corpus.load(tmp_path / "linked")] == list("abcdef")
    for file, ids in (("a.JSONL", "ab"), ("b.json", "cd"), ("c.CSV", "ef")):
        assert [d.name for d in corpus.load(tmp_path / "there" / file)] == list(ids)
