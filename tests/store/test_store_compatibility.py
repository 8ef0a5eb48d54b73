"""What version 0.1.0 wrote is found and read by this one: keys, fingerprints, record bytes and answers are unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import xxhash

from kvgraph import demo, methods, models
from kvgraph.attention.backends import cpu
from kvgraph.engine.engine import Engine
from kvgraph.graph import ContextGraph
from kvgraph.store.disk import DiskStore
from store_worker import got

DATA = Path(__file__).parents[1] / "data"
FIXTURE = DATA / "store_0_1_0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
SHIPPED = EXPECTED["shipped_model"]

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")


def graph(source: dict, method: methods.Method) -> ContextGraph:
    edges = [tuple(edge) for edge in source["edges"]] if method.reads_edges else ()
    return ContextGraph(source["segments"], source["query"], source["prefix"], edges)


def record_hashes(folder: Path) -> dict[str, str]:
    """xxh3-128 of every record file, by its path in the folder."""
    records = sorted((folder / "records").rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in records}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Version 0.1.0 had no products of 16 bits on a CPU. They have a numerics version of their own, so old records are misses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "halves", lambda: None)
        yield


@pytest.fixture(scope="module")
def model(request, exact_products):
    return models.load(DATA / "oracle_small" / "models" / "tiny_default", dtype=request.param)


@pytest.fixture(scope="module")
def shipped():
    return models.load(demo.model(), dtype="float32")


@pytest.fixture
def store(tmp_path):
    """A copy of the old store: reading one writes to its index."""
    return shutil.copytree(FIXTURE / "store", tmp_path / "store")


def test_the_fixture_is_what_was_written():
    assert record_hashes(FIXTURE / "store") == EXPECTED["files"]


@pytest.mark.parametrize(("model", "dtype"), [(dtype, dtype) for dtype in EXPECTED["models"]], indirect=["model"])
def test_an_old_store_serves_every_answer(model, dtype, store):
    expected = EXPECTED["models"][dtype]
    assert model.fingerprint == expected["fingerprint"]
    for spec, keys in expected["keys"].items():
        method = methods.parse(spec)
        with Engine(model, store=store) as engine:
            plan = engine.plan(graph(EXPECTED, method), method)
            assert plan.keys(model.fingerprint, "") == keys, spec
            result = engine.generate(graph(EXPECTED, method), method, max_tokens=6, ignore_eos=True)
        assert result.token_ids == expected["answers"][spec], spec
        assert result.usage.document_tokens_computed == 0, spec
        assert set(result.usage.reused_tokens) == {"disk"}, spec
    assert record_hashes(store) == EXPECTED["files"]


def test_records_are_written_with_the_same_bytes(store, tmp_path):
    """What was read is written again, so that no other processor's rounding can matter."""
    for expected in EXPECTED["models"].values():
        keys = {key for keys in expected["keys"].values() for key in keys if key is not None}
        old = DiskStore(store, fingerprint=expected["fingerprint"])
        new = DiskStore(tmp_path / "new", fingerprint=expected["fingerprint"])
        for key in keys:
            record = got(old, key)
            assert record is not None
            new.put(record)
        old.close()
        new.close()
    assert record_hashes(tmp_path / "new") == EXPECTED["files"]


def test_the_old_store_verifies(store):
    opened = DiskStore(store)
    report = opened.verify()
    opened.close()
    assert report.clean
    assert report.good == len(EXPECTED["files"])
    assert report.rows_added == report.rows_removed == 0


@pytest.mark.parametrize("spec", SHIPPED[0]["methods"])
@pytest.mark.parametrize("source", SHIPPED, ids=["documents", "chunks"])
def test_the_shipped_models_answers_are_unchanged(shipped, source, spec):
    expected, method = source["methods"][spec], methods.parse(spec)
    with Engine(shipped) as engine:
        result = engine.generate(graph(source, method), method, max_tokens=8, stop=(".",))
        logits = engine.logits(engine.plan(graph(source, method), method))
    assert (result.text, result.token_ids) == (expected["text"], expected["token_ids"])
    assert logits[expected["top"]].tolist() == pytest.approx(expected["logits"], abs=1e-3)
