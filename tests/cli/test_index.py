"""`kvgraph index`: a folder becomes a graph that a server answers from, and changes cost what they change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import transformers

import serving
from embedders import Words
from kvgraph import demo, indexing
from kvgraph.data import graphs
from kvgraph.data.library import LIBRARY, Library
from kvgraph.data.retrieval import SearchIndex
from kvgraph.data.retrieval.stored import index_folder
from kvgraph.engine.engine import Engine
from kvgraph.errors import KVGraphError
from kvgraph.methods import GraphKV
from kvgraph.store.disk import DiskStore

transformers.utils.logging.disable_progress_bar()  # it may have been imported before the command line can say so

PAGES = {
    "cape.md": "# The cape\n\nIt is of basalt. See [the light](light.md).\n",
    "light.md": "# The light\n\nIt burns oil. [Its keeper](keeper.md) is Anna.\n",
    "keeper.md": "# The keeper\n\nAnna keeps it.\n",
    "alone.txt": "Nothing leads here.\n",
}
LINKS = ["--graph", "links", "--chunk-tokens", 128, "--no-check"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in PAGES.items():
        (folder / name).write_text(text)
    return folder


def index(run, *words) -> tuple[dict[str, int], str]:
    """(the figures of the command's summary, all that it printed)."""
    code, out, err = run("index", *words)
    assert code == 0, err
    line = re.search(
        r"(?P<chunks>[\d,]+) of (?P<of>[\d,]+) chunks? encoded: (?P<computed>[\d,]+) tokens? computed, (?P<reused>[\d,]+) "
        r"reused, .* written, (?P<forgotten>[\d,]+) records? forgotten",
        out,
    )
    assert line, out
    return {name: int(value.replace(",", "")) for name, value in line.groupdict().items()}, out


def keys(store: Path) -> set[str]:
    return {entry.key for entry in DiskStore(store).ls()}


def test_a_folder_is_served_without_computing_a_document(run, model, corpus, tmp_path):
    store = tmp_path / "kv"
    done, out = index(run, corpus, "--name", "cape", "--store", store, "--model", model, *LINKS)
    assert "4 pages, 4 chunks" in out and "2 edges" in out
    assert done["chunks"] == done["of"] == 4 and done["reused"] == done["forgotten"] == 0
    assert len(keys(store)) == 5  # three alone, and two after what they read; nothing reads the cape alone
    with (
        serving.serve(model, served_name="tiny", store=store) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        graph = http.get("/v1/graphs/cape").json()
        assert (graph["state"], graph["done"], graph["segments"], graph["edges"]) == ("ready", 4, 4, 2)
        body = {"model": "tiny", "prompt": "Who?", "max_tokens": 2, "kvgraph": {"graph": "cape"}}
        usage = http.post("/v1/completions", json=body).json()["usage"]["kvgraph"]
        assert usage["document_tokens_computed"] == 0 and usage["reused_tokens"]["disk"] > 0


def test_a_change_costs_the_page_and_its_readers_and_what_is_gone_is_forgotten(run, model, corpus, tmp_path):
    store, words = tmp_path / "kv", ["--name", "cape", "--model", model, *LINKS]
    index(run, corpus, "--store", store, *words)
    again, out = index(run, corpus, "--store", store, *words)
    assert "nothing changed" in out and again["computed"] == again["chunks"] == again["forgotten"] == 0
    before = keys(store)

    (corpus / "keeper.md").write_text("# The keeper\n\nBerta keeps it now.\n")
    (corpus / "alone.txt").unlink()
    changed, out = index(run, corpus, "--store", store, *words)
    assert "2 pages, with 1 new chunk and 2 gone; unchanged, but reading something else now: 1; as before: 1" in out
    assert changed["chunks"] == 2 and changed["forgotten"] == 3  # the old keeper, what read it, and the page alone
    assert len(before - keys(store)) == 3 and len(keys(store) - before) == 2

    fresh = tmp_path / "fresh"
    index(run, corpus, "--store", fresh, *words)
    assert keys(fresh) == keys(store), "a changed index holds what a new one would"


def test_renaming_a_page_moves_nothing_but_its_name(run, model, corpus, tmp_path):
    store, words = tmp_path / "kv", ["--name", "cape", "--model", model, *LINKS]
    index(run, corpus, "--store", store, *words)
    (corpus / "alone.txt").rename(corpus / "other.md")
    (corpus / "other.md").write_text("# alone\n\nNothing leads here.\n")
    before = keys(store)
    index(run, corpus, "--store", store, *words)
    assert len(before - keys(store)) == 1 and len(keys(store) - before) == 1  # its title stands in its text


def test_an_interrupted_index_is_continued(run, model, corpus, tmp_path, monkeypatch):
    store, words = tmp_path / "kv", ["--name", "cape", "--model", model, *LINKS]
    whole = indexing.encoding
    seen = []

    def stopping(*given):
        seen.append(given)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(indexing, "encoding", stopping)
    code, _, err = run("index", corpus, "--store", store, *words)
    assert code == 130 and "run the same command again to continue" in err
    monkeypatch.setattr(indexing, "encoding", whole)
    index(run, corpus, "--store", store, *words)
    fresh = tmp_path / "fresh"
    index(run, corpus, "--store", fresh, *words)
    assert keys(store) == keys(fresh)


def test_what_is_noted_as_encoded_is_stored(run, model, corpus, tmp_path, monkeypatch):
    """A server that resumes a graph skips every place before the noted one, so these must be stored. Here the first place
    is encoded last.
    """
    store, noted, progress, ran = tmp_path / "kv", [], Library.progress, Engine.run

    def watched(self, graph, state, done, error=None):
        noted.append((state, done, len(keys(store))))
        return progress(self, graph, state, done, error)

    def backwards(self, requests, **more):
        return iter(list(ran(self, requests, **more))[::-1])

    monkeypatch.setattr(indexing, "NOTED", 1)
    monkeypatch.setattr(Library, "progress", watched)
    monkeypatch.setattr(indexing, "closing", nullcontext)
    monkeypatch.setattr(Engine, "run", backwards)
    index(run, corpus, "--name", "cape", "--store", store, "--model", model, *LINKS)
    running = [(done, stored) for state, done, stored in noted if state == "running"]
    assert [done for done, _ in running] == [0, 0, 0, 3] and all(stored == 5 for _, stored in running)


def test_two_indexes_share_chunks_and_each_keeps_its_own(run, model, corpus, tmp_path):
    store, words = tmp_path / "kv", ["--model", model, *LINKS]
    index(run, corpus, "--name", "one", "--store", store, *words)
    first = keys(store)
    second, _ = index(run, corpus, "--name", "two", "--store", store, *words)
    assert second["computed"] == 0 and keys(store) == first
    code, out, _ = run("index", "ls", "--store", store, "--json")
    assert code == 0 and [(row["name"], row["chunks"]) for row in json.loads(out)] == [("one", 4), ("two", 4)]
    code, out, err = run("index", "rm", "two", "--store", store, "--yes")
    assert code == 0 and "removed two" in out, err
    again, _ = index(run, corpus, "--name", "one", "--store", store, *words)
    assert again["computed"] == 0 and keys(store) == first
    code, out, err = run("index", "rm", "one", "--store", store, "--yes")
    assert code == 0 and not keys(store), err
    assert "has no index; make one" in run("index", "ls", "--store", store)[1]
    index(run, corpus, "--name", "half", "--store", store, *words, "--dtype", "bfloat16")
    code, _, err = run("index", "rm", "half", "--store", store, "--yes")
    assert code == 1 and "--dtype" in err
    code, _, err = run("index", "rm", "half", "--store", store, "--yes", "--dtype", "bfloat16")
    assert code == 0 and not keys(store), err


def test_a_dry_run_writes_nothing_and_its_tokens_come_true(run, model, corpus, tmp_path):
    store, words = tmp_path / "kv", [corpus, "--name", "cape", "--store", tmp_path / "kv", "--model", model, *LINKS]
    code, out, err = run("index", *words, "--dry-run")
    assert code == 0 and not store.exists() and "nothing was written" in out, err
    assert "KV on disk" in out and "time        about" in out
    tokens = int(re.search(r"tokens +([\d,]+)", out)[1].replace(",", ""))
    assert index(run, *words)[0]["computed"] == tokens
    (corpus / "keeper.md").write_text("# The keeper\n\nBerta.\n")
    code, out, _ = run("index", *words, "--dry-run")
    tokens = int(re.search(r"tokens +([\d,]+)", out)[1].replace(",", ""))
    assert "1 page, with 1 new chunk and 1 gone" in out and len(keys(store)) == 5
    assert index(run, *words)[0]["computed"] == tokens


def test_show_prints_degrees_and_draws_a_page(run, model, corpus, tmp_path):
    store = tmp_path / "kv"
    index(run, corpus, "--name", "cape", "--store", store, "--model", model, *LINKS)
    page = tmp_path / "graph.html"
    code, out, err = run("index", "show", "cape", "--store", store, "--out", page)
    assert code == 0, err
    assert re.search(r"sources of a chunk +0\.5 +1 +1 +1", out) and "2 of 4 chunks read nothing; 1 have no edge" in out
    text = page.read_text()
    assert "The keeper" in text and "class Drawing" in text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text) and "import " not in text.split("<script")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CORPUS", "--name", "a b", "--store", "STORE"], "--name 'a b' may have letters"),
        (["CORPUS", "--name", "a"], "index needs --store FOLDER"),
        (["nowhere", "--name", "a", "--store", "STORE"], "there is no file or folder nowhere"),
        (["CORPUS", "--name", "a", "--store", "STORE", "--graph", "magic"], "there is no graph builder 'magic'"),
        (["CORPUS", "--name", "a", "--store", "STORE", "--method", "block"], "block reads no edges"),
        (["CORPUS", "--name", "a", "--store", "STORE", "--chunk-tokens", "20000"], "the model's limit is 32768"),
        (["EMPTY", "--name", "a", "--store", "STORE"], "holds no pages that can be read"),
        (["show", "none", "--store", "STORE"], "has no index 'none'; it has none"),
        (["rm", "none", "--store", "STORE"], "has no index 'none'"),
    ],
)
def test_mistakes_are_one_line(run, model, corpus, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    places = {"CORPUS": corpus, "STORE": tmp_path / "kv", "EMPTY": tmp_path / "empty"}
    more = ["--model", model, "--no-check"] if words[0] in ("CORPUS", "EMPTY", "nowhere") else []
    code, _, err = run("index", *(places.get(word, word) for word in words), *more)
    assert code in (1, 2) and message in err and err.count("\n") == 1, err


def test_a_folder_named_as_a_command_can_be_indexed(run, model, corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "ls")
    monkeypatch.chdir(tmp_path)
    assert index(run, "./ls", "--name", "x", "--store", "kv", "--model", model, *LINKS)[0]["of"] == 4


def test_a_lost_description_is_made_again_and_a_wrong_one_is_named(run, model, corpus, tmp_path):
    store, words = tmp_path / "kv", ["--name", "cape", "--model", model, *LINKS]
    index(run, corpus, "--store", store, *words)
    indexing.describing(store, "cape").unlink()
    assert index(run, corpus, "--store", store, *words)[0]["computed"] == 0
    indexing.describing(store, "cape").write_text('{"format": 9}')
    with pytest.raises(KVGraphError, match="isn't of format 1; index its source again"):
        indexing.described(store, "cape")


def test_the_whole_graphs_keys_are_those_that_a_server_asks_for(model, corpus, tmp_path):
    """The reference: what the library's parts need, one chunk at a time, is what the plan of the whole encodes."""
    with Engine.load(model, check=False, store=tmp_path / "kv") as engine:
        layout = indexing.Layout(graphs.parse("structure+links"), 64, GraphKV())
        planned = indexing.PlannedCorpus(engine, corpus, layout, print)
        there = indexing.CorpusIndex(tmp_path / "kv", engine, "cape")
        there.write(planned, str(corpus))
        there.close()
        library = Library(tmp_path / "kv" / LIBRARY, engine.model.fingerprint)
        graph = library.graph("", "cape")
        needed = set()
        for place in range(graph.segments):
            plan = graph.method.plan(library.part(graph, [place]).graph([0]))
            needed |= {key for key in engine.keys(plan) if key is not None}
        library.close()
        assert needed == set(planned.versions.tokens) == keys(tmp_path / "kv")
        assert graph.method.band == 64 and graph.spans == len(needed)


def test_two_models_index_a_corpus_by_one_name(model, corpus, tmp_path):
    """Each finds chunks in its own search index, until it forgets it."""
    layout, homes = indexing.Layout(graphs.parse("links"), 128, GraphKV()), []
    for dtype, embedder in (("float32", Words()), ("bfloat16", None)):
        with Engine.load(model, check=False, dtype=dtype, store=tmp_path / "kv") as engine:
            there = indexing.CorpusIndex(tmp_path / "kv", engine, "cape")
            there.write(indexing.PlannedCorpus(engine, corpus, layout, print), str(corpus), embedder=embedder)
            homes.append(index_folder(tmp_path / "kv", "", "cape", engine.model.fingerprint))
            if embedder is None:
                assert [SearchIndex.open(home).embedder for home in homes] == ["words", None]
                there.remove()
            there.close()
    assert [home.exists() for home in homes] == [True, False]


def test_listing_does_not_wait_for_torch():
    """`index ls` and `index show` read one file, so nothing that they import may load the model's libraries."""
    program = "import sys, kvgraph.cli.index, kvgraph.indexing, kvgraph.cli.graph_page; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
