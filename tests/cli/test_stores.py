"""Commands and their stores: places from flags and the environment, codecs, and what a codec or a tier costs."""

from __future__ import annotations

import io
import json
import re
import urllib.request

import pytest

from kvgraph import demo
from kvgraph.cli import store as store_command
from kvgraph.store.base import tenant_id
from kvgraph.store.open import open_catalog

RECORDS = "records/*/*.safetensors"
BENCH = [
    "--documents",
    2,
    "--length",
    20,
    "--query",
    4,
    "--new-tokens",
    2,
    "--repeats",
    1,
    "--no-check",
    "--method",
    "block",
]

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": f"fact number {n}"}) + "\n" for n in range(3)))
    return str(path)


@pytest.fixture
def kept(run, model, corpus, tmp_path):
    """A store with three records."""
    folder = tmp_path / "kv"
    code, _, err = run(
        "encode", model, corpus, "--method", "block", "--template", "{text}", "--store", folder, "--no-check"
    )
    assert code == 0, err
    return folder


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_the_environment_names_the_store_of_every_command(run, model, corpus, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("KVGRAPH_STORE", json.dumps([str(first), str(second)]))
    common = ["--method", "block", "--template", "{text}", "--no-check"]
    assert run("encode", model, corpus, *common)[0] == 0
    assert [len(list(folder.glob(RECORDS))) for folder in (first, second)] == [3, 3]
    asked = ["ask", model, "why?", "--documents", corpus, "--max-tokens", 2, "--json", *common]
    assert json.loads(run(*asked)[1])["usage"]["document_tokens_computed"] == 0
    listed = rows(run("store", "stats", "--json")[1])[0]["shares"]
    assert [(share["place"], share["records"]) for share in listed] == [(str(first), 3), (str(second), 3)]
    other = json.loads(run(*asked, "--store", tmp_path / "third")[1])["usage"]
    assert other["document_tokens_computed"] > 0, "a flag wins"
    monkeypatch.delenv("KVGRAPH_STORE")
    code, _, err = run("store", "stats")
    assert code == 2 and "give --store PLACE, or set KVGRAPH_STORE" in err and err.count("\n") == 1


def test_what_a_codec_costs_is_measured_on_answers(run, model, tmp_path):
    data = tmp_path / "items.jsonl"
    item = {"question": "why?", "answer": "because", "documents": ["one fact and more", {"title": "t", "text": "two"}]}
    data.write_text(json.dumps(item) + "\n")

    def checked(codec, *more):
        code, out, err = run("check", model, "--data", data, "--codec", codec, "--json", *more)
        assert code == 0, err
        return json.loads(out)["quality"]

    def near(nats):  # batches differ with and without a codec, and with them the last bits on some processors
        return pytest.approx(nats, abs=1e-4)

    exact, lossy = checked("zstd", "--method", "block"), checked("kivi:bits=2", "--method", "block")
    nll, full = exact["nll"], exact["full_nll"]
    assert exact["codec_nll"] == near(nll) and lossy["nll"] == near(nll) and lossy["codec_nll"] != near(nll)
    assert lossy["full_nll"] == near(full) and nll != near(full)
    alone = checked("kivi:bits=2")
    assert alone["method"] == "full" and alone["nll"] == near(alone["full_nll"]) and alone["codec_nll"] != near(full)
    out = run("check", model, "--method", "block", "--data", data, "--codec", "kivi:bits=2")[1]
    difference = float(re.search(r"codec kivi:bits=2: ([+-]\d+\.\d{4}) nats per token", out)[1])
    assert difference == pytest.approx(lossy["codec_nll"] - lossy["nll"], abs=2e-4) and "block, kivi:bits=2" in out
    for words, said in (
        (["--codec", "kivi"], "--codec needs --data"),
        (["--codec", "gzip", "--data", data], "there is no codec 'gzip'"),
    ):
        code, _, err = run("check", model, *words)
        assert code in (1, 2) and said in err and err.count("\n") == 1


def test_an_evaluation_with_a_codec_is_a_run_of_its_own(run, model, tmp_path):
    data = tmp_path / "hotpot.json"
    paragraphs = [["The harbour", ["Anna dug it."]], ["The ferry", ["It leaves at nine."]]]
    data.write_text(
        json.dumps(
            [
                {
                    "_id": f"q{n}",
                    "question": "Who dug it?",
                    "answer": "Anna",
                    "type": "bridge",
                    "level": "easy",
                    "supporting_facts": [["The harbour", 0]],
                    "context": paragraphs,
                }
                for n in range(2)
            ]
        )
    )
    words = ["eval", "--task", "hotpotqa", "--method", "block", "--model", model, "--data", data, "--max-tokens", 2]
    words += ["--no-check", "--out", tmp_path / "runs", "--store", tmp_path / "kv"]
    for codec in (None, "zstd", "kivi:bits=2", "kivi:bits=2"):
        code, out, err = run(*words, *([] if codec is None else ["--codec", codec]))
        assert code == 0, err
        assert ("block, kivi:bits=2" in out) == (codec == "kivi:bits=2")
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*/summary.json")}
    assert runs.keys() == {"block", "block+kivi_bits=2"}, "a lossless codec changes no answer"
    assert runs["block+kivi_bits=2"]["codec"] == "kivi:bits=2" and "codec" not in runs["block"]
    catalog = open_catalog(tmp_path / "kv")
    assert {entry.codec for entry in catalog.entries()} == {"raw", "kivi:bits=2"}


def test_bench_reads_from_a_store_and_leaves_nothing_there(run, model, kept):
    before = {path.name for path in kept.glob(RECORDS)}
    code, out, err = run("bench", model, *BENCH, "--store", kept, "--codec", "int8", "--json")
    assert code == 0, err
    found = json.loads(out)
    (row,) = found["rows"]
    assert row["stored_ttft"] > 0 and row["stored_from"] == {"disk": 40}
    assert found["settings"]["store"] == [str(kept)] and found["settings"]["codec"] == "int8"
    assert {path.name for path in kept.glob(RECORDS)} == before
    out = run("bench", model, *BENCH, "--store", kept)[1]
    assert re.search(r"TTFT stored +from\n", out) and re.search(r" disk\n", out)
    assert "TTFT stored" not in run("bench", model, *BENCH)[1]


# -- kvgraph store -----------------------------------------------------------------------------------------------------


def test_every_operation_speaks_json(run, model, kept, tmp_path):
    def told(*words, code=0):
        got, out, err = run("store", *words, "--json")
        assert got == code, err
        return rows(out)

    store = ["--store", kept]
    listed = told("ls", *store)
    assert len(listed) == 3 and {"key", "size", "fingerprint", "tenant", "codec", "pinned", "used"} <= listed[0].keys()
    key, fingerprint = listed[0]["key"], listed[0]["fingerprint"]
    (stats,) = told("stats", *store)
    assert [share["records"] for share in stats["shares"]] == [3] and stats["quarantined"] == 0
    assert told("pin", *store, key[:10]) == [{"store": str(kept), "pinned": key}]
    assert told("gc", *store, "--max-size", "1B", "--dry-run")[0]["removed"] == 2
    file = tmp_path / "three.kvgraph"
    assert told("export", file, *store)[0]["records"] == 3
    assert told("migrate", *store, "--codec", "zstd")[0]["records"] == 3
    assert {entry["codec"] for entry in told("ls", *store)} == {"zstd"}
    assert told("gc", *store, "--max-size", "1B")[0]["removed"] == 2 and [e["key"] for e in told("ls", *store)] == [key]
    assert told("unpin", *store, key[:10]) == [{"store": str(kept), "unpinned": key}]
    (report,) = told("verify", *store)
    assert report["good"] == 1 and report["clean"] and not report["repaired"]
    assert told("rm", *store, "--all", "--yes")[0]["removed"] == 1
    assert told("import", file, *store, "--model", fingerprint[:8])[0]["records"] == 3
    assert told("import", file, *store, "--model", model)[0]["there"] == 3


def test_an_import_into_another_models_store_is_refused(run, kept, tmp_path):
    file = tmp_path / "three.kvgraph"
    assert run("store", "export", file, "--store", kept)[0] == 0
    code, _, err = run("store", "import", file, "--store", tmp_path / "new", "--model", "0123456789abcdef")
    assert code == 1 and "holds records of the model with fingerprint" in err and err.count("\n") == 1
    assert not list(tmp_path.glob(f"new/{RECORDS}"))
    code, _, err = run("store", "export", file, "--store", kept)
    assert code == 1 and "exists; give another name" in err


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (2, "say where to", ["migrate", "--store", "{kept}"]),
        (2, "give one --store", ["migrate", "--store", "{kept}", "--store", "{kept}", "--codec", "zstd"]),
        (1, "encode the documents again", ["migrate", "--store", "{kept}", "--codec", "int8"]),
        (2, "KVGRAPH_REDIS_PASSWORD", ["migrate", "--store", "{kept}", "--to", "redis://:hunter2@h/0"]),
        (2, "isn't the beginning of a fingerprint", ["ls", "--store", "{kept}", "--model", "llama"]),
        (1, "there are no such records", ["export", "{kept}/f", "--store", "{kept}", "--tenant", "nobody"]),
        (1, "there is no store", ["stats", "--store", "{kept}/none"]),
        (1, "there is no kind of store", ["stats", "--store", "ftp://h/x"]),
        (1, "can't be read", ["stats", "--store", "{kept}", "--server", "http://127.0.0.1:1"]),
        (1, "can't be read", ["stats", "--store", "{kept}", "--server", "file:///etc"]),
        (1, "isn't the beginning of a key", ["pin", "--store", "{kept}", "xyz"]),
        (1, "no records start with", ["rm", "--store", "{kept}", "00000000000000"]),
        (1, "isn't an export", ["import", "{kept}/VERSION", "--store", "{kept}", "--model", "0123456789"]),
        (1, "can't", ["stats", "--store", "redis://127.0.0.1:1/0?timeout=0.2"]),
    ],
)
def test_mistakes_are_one_line(code, said, words, run, kept):
    got, _, err = run("store", *[word.format(kept=kept) for word in words])
    assert got == code and said in err and err.count("\n") == 1 and "hunter2" not in err, err


def test_records_are_not_moved_to_where_they_are(run, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(kept)
    for same in (kept, "link", kept / ".." / kept.name):
        code, _, err = run("store", "migrate", "--store", kept, "--to", same, "--move")
        assert code == 2 and f"--to {same} is the store itself" in err and err.count("\n") == 1
    assert len(rows(run("store", "ls", "--store", kept, "--json")[1])) == 3


def test_counts_of_a_server_are_those_of_all_its_replicas(monkeypatch):
    lines = (
        'kvgraph_store_hits_total{replica="0",tier="disk"} 3.0\nkvgraph_store_hits_total{tier="disk",replica="1"} 4.0\n'
    )
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(lines.encode()))
    assert store_command._served("http://server") == {"disk": {"hits": 7.0}}


def test_tenants_are_chosen_by_name(run, kept):
    assert rows(run("store", "stats", "--store", kept, "--tenant", "", "--json")[1])[0]["shares"]
    for tenant in ("anna", tenant_id("anna")):
        assert not rows(run("store", "stats", "--store", kept, "--tenant", tenant, "--json")[1])[0]["shares"]
