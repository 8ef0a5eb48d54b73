"""Encoding on Ray: workers leave the store that one process leaves, and one that is killed costs its batch."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvgraph import Engine
from kvgraph.data import corpus
from kvgraph.encoding import Documents, Done, Encoder, PlannedSpans, batches, levels
from kvgraph.graph import ContextGraph
from kvgraph.methods import parse
from kvgraph.plan import Plan
from kvgraph.store.open import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # Ray's own
]


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
        killed.extend(workers()[:1])
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


def workers() -> list[int]:
    """Processes of this Ray that encode."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::") and b"_Worker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_the_plan_of_a_single_span_reads_what_the_span_reads():
    assert levels(Plan(parse("block").plan(ContextGraph([[1, 2]], [3])).spans))[0][0].spans[0].tokens == (1, 2)
