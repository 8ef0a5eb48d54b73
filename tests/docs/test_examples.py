"""The commands and code of the tutorial, of the how-tos and of docs/extending.md, run as a reader would run them.

A tiny random model stands in for the models that the pages name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvgraph import demo
from kvgraph.store.codecs.registry import packed
from remotes import RedisServer, S3Server, has_redis

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    folder.mkdir()
    demo.write_model(folder)
    return folder


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(script: str, folder: Path) -> list[list[str]]:
    """The arguments of every `kvgraph` that a script calls; all else in it (making files) happens in the folder.

    The calls themselves are left to the test, which makes them in this process: starting Python for each takes seconds.
    """
    stub = folder / "bin" / "kvgraph"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" >>calls\necho >>calls\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True, timeout=60)
    calls = (folder / "calls").read_text(encoding="utf-8").split("\0\n")
    return [call.split("\0") for call in calls[:-1]]


def test_the_tutorial(model, tmp_path, monkeypatch, run, capsys):
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    script = "\n".join(blocks("tutorial.md", "sh")).replace(f"MODEL={name}", f"MODEL={model}")
    calls = commands(script, tmp_path)
    assert [call[0] for call in calls] == ["encode", "ask", "ask", "explain", "explain", "ask", "check"]
    assert all(str(model) in call for call in calls)
    monkeypatch.chdir(tmp_path)
    done = [run(*call) for call in calls]
    assert not any(code for code, _, _ in done)
    out, costs = [out for _, out, _ in done], [err.strip() for _, _, err in done]
    assert out[0].startswith("3 documents: ")
    assert all("(0 of documents)" in costs[i] for i in (1, 2))  # both questions by `block` find every document
    assert re.search(r"\((?!0 )\d+ of documents\), 0 reused", costs[5])  # `full` computes all
    assert "block: 5 spans" in out[3] and "graph-kv: 5 spans" in out[4]  # as the page shows them
    assert "composes exactly" in out[6] and "\ndifference " in out[6]

    (code,) = blocks("tutorial.md", "python")
    exec(code.replace(name, str(model)), {})
    assert re.fullmatch(r"\d+ \{'disk': \d+\}", capsys.readouterr().out.splitlines()[-1])


def test_the_how_to_index_a_folder(model, tmp_path, monkeypatch, run):
    """Page by page as written: what stands between two commands happens between them."""
    monkeypatch.setattr(demo, "adapter", lambda: model)
    monkeypatch.chdir(tmp_path)
    done = []
    for i, script in enumerate(blocks("how-to/documents.md", "sh")):
        shutil.rmtree(tmp_path / "bin", ignore_errors=True)
        (tmp_path / "calls").write_text("")
        for call in commands(script, tmp_path):
            done.append((i, call[:2], *run(*call, *(["--no-check"] if call[1] in ("notes", "--index") else []))))
    *words, asked = (call for _, call, *_ in done)
    assert words == [["index", word] for word in ("notes", "notes", "ls", "show", "notes")]
    assert asked == ["ask", "--index"]
    assert not any(code for _, _, code, _, _ in done), done
    dry, first, listed, shown, changed, answer = (out for *_, out, _ in done)
    assert "3 pages, 3 chunks" in dry and "nothing was written" in dry and "3 of 3 chunks encoded" in first
    assert "notes" in listed and "drawn in notes-graph.html" in shown
    assert "1 page, with 1 new chunk and 1 gone; unchanged, but reading something else now: 1; as before: 1" in changed
    assert "2 of 3 chunks encoded" in changed
    assert "[1] Harbour (harbour" in answer


def test_the_how_to_look_at_a_plan(tmp_path, monkeypatch, run, capsys):
    (script,) = [block for block in blocks("how-to/inspect.md", "sh") if "--ids" in block]
    ((*call,),) = commands(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*call)
    assert code == 0, err
    assert (
        "kvlink: 2 spans; 4 tokens cached in 1 span, 3 in the prompt span" in out
    )  # two link tokens and the query's placeholder
    (code,) = blocks("how-to/inspect.md", "python")
    exec(code, {})
    assert "graph-kv: " in capsys.readouterr().out


@pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")
def test_the_how_to_share_a_store(model, tmp_path, monkeypatch, run):
    """With real servers in place of those that the page names."""
    redis, s3 = RedisServer(tmp_path), S3Server()
    try:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        page = "\n".join(blocks("how-to/share.md", "sh"))
        script = page.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)).replace(
            "redis://127.0.0.1:6379/0", redis.url
        )
        calls = commands(script.replace("rm -r kv\n", ""), tmp_path)
        monkeypatch.chdir(tmp_path)
        said = []
        for call in calls:
            if call[0] == "ask" and "s3" in call[-1] and not any("s3)" in err for _, _, err in said):
                shutil.rmtree("kv")  # as the page does
            said.append(run(*call))
            assert said[-1][0] == 0, said[-1]
        costs = [err for _, _, err in said if "reused" in err]
        assert [re.search(r"reused \(\d+ (\w+)\)", cost)[1] for cost in costs] == ["redis", "s3", "disk"]
        assert all("(0 of documents)" in cost for cost in costs)
        assert sum("codec kivi: " in out for _, out, _ in said) == 1
        (stats,) = [out for (_, out, _), call in zip(said, calls, strict=True) if call[1] == "stats"]
        assert [len(re.findall(f" {tier} ", stats)) for tier in ("disk", "redis", "s3")] == [1, 1, 1]
        last = [out for _, out, _ in said[-5:]]
        assert "2 records are good" in last[0] and "removed 0 records" in last[1] and "2 were there already" in last[2]
        assert last[3].startswith("exported 2 records") and last[4].startswith("imported 2 records")
    finally:
        redis.kill()
        s3.kill()


def test_extending(model, tmp_path, monkeypatch):
    """The blocks build on each other, and on the files that the page names; what they make is checked here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in ("colours.py", "short.py"):
        (text,) = blocks("extending.md", f'python title="{file}"')
        (tmp_path / file).write_text(text, encoding="utf-8")
    (tmp_path / "llama").symlink_to(model)
    names: dict = {}
    results = []
    for code in blocks("extending.md", "python"):
        exec(code, names)
        results.append(names.get("result"))
    engine, graph = names["engine"], names["ContextGraph"]([[5, 6], [7]], query=[8])
    plan = names["Reversed"]().plan(graph)
    assert [(span.tokens, span.start) for span in plan.spans] == [((7,), 0), ((5, 6), 1), ((8,), 3)]
    assert names["window"](3, 2) == ((0, 1), (0, 2), (1, 2))
    assert len([r for r in results if r]) and all(r.finish_reason in ("stop", "length") for r in results if r)
    record = next(iter(names["store"].records.values()))
    halved = packed(record, names["Half"]())
    assert all(torch.equal(a, b.half().float()) for a, b in zip(halved.keys, record.keys, strict=True))
    assert len(names["store"].records) == 2  # one of each document
    assert [len(shelf) for shelf in names["SHELVES"].values()] == [2]
    codec, record = names["Half"](), next(iter(names["store"].records.values()))
    (keys, *_), _ = codec.unpack(codec.pack(record), len(record), record.keys[0].dtype)
    assert keys.dtype == record.keys[0].dtype and 0 < (keys - record.keys[0]).abs().max() < 1e-2
    assert names["summary"]["scores"]["substring_em"]["n"] == 1
    assert (tmp_path / "runs/colours/block/results.jsonl").read_text().count("\n") == 1
    engine.close()
    monkeypatch.delitem(sys.modules, "colours")
