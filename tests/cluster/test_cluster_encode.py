"""Encoding on Ray: workers leave the store that one process leaves, and one that is killed costs its batch."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from clusters import encoding_workers
from kvgraph import Engine
from kvgraph.data import corpus
from kvgraph.encoding import Documents, Done, Encoder, PlannedSpans, batches, levels, plan_batches
from kvgraph.errors import StoreError
from kvgraph.graph import ContextGraph
from kvgraph.methods import parse
from kvgraph.plan import Plan
from kvgraph.store.open import open_store
from kvgraph.store.remote.store import RemoteStore
from remotes import MemoryPlace
from serving import until

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # Ray's own
]


PAGES = {
    "cape.md": "# The cape\n\nIt is of basalt. See [the light](light.md).\n",
    "light.md": "# The light\n\nIt burns oil. [Its keeper](keeper.md) is Anna.\n",
    "keeper.md": "# The keeper\n\nAnna keeps it.\n",
    "alone.txt": "Nothing leads here.\n",
}


@pytest.fixture
def documents(tmp_path, monkeypatch) -> list[corpus.CorpusDocument]:
    monkeypatch.setattr("kvgraph.encoding.MOST", 4)
    path = tmp_path / "c.jsonl"
    texts = [f"{i:02} " + "some words " * (1 + i * 7 % 5) for i in range(18)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return corpus.load(path, "{text}")


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("records/*/*.safetensors")}


def encode(items: Documents, work: list, store: Path, model: Path) -> Done:
    done = Done()
    with Encoder(items, [str(store)], model=str(model), check=False) as encoder:
        for batch in work:
            done.add(encoder.encode(batch))
        done.stored += encoder.flush()
    return done


def test_batches_may_be_encoded_in_any_order_and_change_no_byte(model_folder, documents, tmp_path):
    """What two workers do to a store, without Ray: every batch, each by another engine, the last first."""
    items, work = Documents(parse("full"), "Read:\n"), list(batches(documents))
    whole = encode(items, work, tmp_path / "one", model_folder)
    assert len(work) == 5 and whole.items == 18
    parts = [encode(items, [batch], tmp_path / "two", model_folder) for batch in reversed(work)]
    assert len(records(tmp_path / "one")) == 19
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert sum(p.computed for p in parts) == whole.computed and sum(p.stored for p in parts) == whole.stored
    again = encode(items, work, tmp_path / "two", model_folder)
    assert (again.computed, again.stored, again.reused) == (0, 0, whole.computed - len("Read:\n"))


def test_a_store_that_doesnt_answer_is_tried_again_and_one_that_is_full_isnt(
    model_folder, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr("kvgraph.encoding.PAUSE", 0.05)
    work = list(batches(documents))[:2]
    place = MemoryPlace()
    with Encoder(Documents(parse("block"), ""), [str(tmp_path)], model=str(model_folder), check=False) as encoder:
        encoder.store = RemoteStore(place, "redis", "redis://cache", encoder.engine.fingerprint)
        place.fault = "dead"
        encoder.encode(work[0])
        until(lambda: place.calls > 3)
        place.fault = None
        encoder.flush()
        assert len(place.kept) == len(work[0])
        place.fault = "full"
        encoder.encode(work[1])
        with pytest.raises(StoreError, match="can't keep a record in redis://cache: full"):
            encoder.flush()


def test_a_graph_is_encoded_level_by_level(model_folder, tmp_path):
    """Every version once, in levels; the keys are those that a query over the whole graph reads, and none is computed."""
    texts = ["one fact", "another fact", "a third", "a fourth one"]
    graph = ContextGraph(texts, "why?", edges=[(0, 1), (1, 2), (0, 2), (2, 3)])
    with Engine.load(model_folder, check=False) as engine:
        plan = engine.plan(graph, parse("graph-kv:rounds=2"))
        keys = engine.keys(plan)
    made = levels(plan)
    assert len(made) == 3 and sum(map(len, made)) == len({key for key in keys if key is not None})
    for level in made:
        encode(PlannedSpans(), [level[:1], level[1:]], tmp_path / "kv", model_folder)  # type: ignore[arg-type]
    with Engine.load(model_folder, check=False, store=tmp_path / "kv") as engine:
        warm = engine.generate(graph, "graph-kv:rounds=2", max_tokens=8)
    assert warm.usage.document_tokens_computed == 0
    with Engine.load(model_folder, check=False) as engine:
        assert engine.generate(graph, "graph-kv:rounds=2", max_tokens=8).token_ids == warm.token_ids


def test_two_workers_continue_what_was_begun_and_leave_the_bytes_of_one_process(
    local_ray, model_folder, documents, tmp_path
):
    from kvgraph.cluster.encoding import encode_on

    items, loading = Documents(parse("full"), "Read:\n"), {"model": str(model_folder), "check": False}
    work = list(batches(documents))
    whole = encode(items, work, tmp_path / "one", model_folder)
    begun = encode(items, work[:2], tmp_path / "two", model_folder)
    done = Done()
    encode_on("auto", items, documents, [str(tmp_path / "two")], loading, done, workers=2)
    assert (done.items, done.reused) == (18, begun.computed - len("Read:\n"))
    assert done.computed == whole.computed - begun.computed and done.stored == whole.stored - begun.stored
    assert len(records(tmp_path / "one")) == 19
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_two_workers_encode_a_graph_level_by_level_to_the_bytes_of_one_process(
    local_ray, model_folder, tmp_path, monkeypatch
):
    from kvgraph.cluster.encoding import encode_levels

    monkeypatch.setattr("kvgraph.encoding.MOST", 2)
    texts = [f"fact {i} " + "of many words " * (1 + i * 5 % 4) for i in range(7)]
    graph = ContextGraph(texts, "why?", edges=[(0, 4), (1, 4), (2, 5), (3, 6), (0, 6)])
    with Engine.load(model_folder, check=False) as engine:
        made = levels(engine.plan(graph, parse("graph-kv")))
    assert [len(list(plan_batches(level))) for level in made] == [2, 2]
    computed = 0
    for level in made:
        computed += encode(PlannedSpans(), list(plan_batches(level)), tmp_path / "one", model_folder).computed
    loading = {"model": str(model_folder), "check": False}
    done = encode_levels("auto", [str(tmp_path / "two")], loading, 2, 0, made)
    assert (done.items, done.computed, done.reused) == (7, computed, 0)
    assert len(records(tmp_path / "one")) == 7
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_a_folder_is_indexed_by_two_workers_and_costs_nothing_again(local_ray, model_folder, tmp_path, run):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in PAGES.items():
        (corpus / name).write_text(text)
    words = [corpus, "--name", "cape", "--model", model_folder, "--graph", "links", "--chunk-tokens", 128, "--no-check"]
    code, out, err = run("index", *words, "--store", tmp_path / "two", "--ray", "auto", "--workers", 2)
    assert code == 0 and "4 of 4 chunks encoded" in out and err.count(" tokens/s") >= 2, (out, err)
    code, out, _ = run("index", *words, "--store", tmp_path / "one")
    assert code == 0 and records(tmp_path / "one").keys() == records(tmp_path / "two").keys()
    code, out, _ = run("index", *words, "--store", tmp_path / "two")
    assert code == 0 and "0 of 4 chunks encoded: 0 tokens computed" in out


def test_two_workers_leave_the_store_of_one_process_also_if_one_is_killed(
    local_ray, model_folder, documents, tmp_path, capsys
):
    from kvgraph.cluster.encoding import encode_on

    items, loading = Documents(parse("block"), ""), {"model": str(model_folder), "check": False}
    whole = encode(items, list(batches(documents)), tmp_path / "one", model_folder)
    kept = tmp_path / "two"
    killed: list[int] = []

    def kill_one() -> None:
        """Kill the worker that is at work, once a record is there."""
        while not records(kept):
            time.sleep(0.01)
        killed.extend(encoding_workers()[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = Done()
    encode_on("auto", items, documents, [str(kept)], loading, done, workers=2)
    killer.join()
    assert killed
    assert done.items == 18 and done.computed + done.reused == whole.computed
    assert records(kept).keys() == records(tmp_path / "one").keys()
    store = open_store(kept, Engine.load(model_folder, check=False).fingerprint)
    assert all(store.get(key.removesuffix(".safetensors")) for key in records(kept))
    told = capsys.readouterr().err.splitlines()
    assert any("tokens/s" in line and line.startswith("worker ") for line in told)

    again = encode(items, list(batches(documents)), kept, model_folder)  # as the same command would
    assert (again.computed, again.reused) == (0, whole.computed)


def test_the_plan_of_a_single_span_reads_what_the_span_reads():
    assert levels(Plan(parse("block").plan(ContextGraph([[1, 2]], [3])).spans))[0][0].spans[0].tokens == (1, 2)
