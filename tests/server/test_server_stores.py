"""A server's store by URL: which tiers it has, where the library is, whose records are whose, and what is never shown."""

from __future__ import annotations

import gc
import json
import logging
import re

import httpx
import pytest

from kvgraph import Engine
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.state import library_place, load_engine
from kvgraph.store.base import tenant_id
from kvgraph.store.remote.base import Space
from remotes import RedisServer, has_redis
from serving import ANNA, BEN, DOCUMENTS, KEYS, Live, application, serving

SECRET = "hunter2"
URL = f"redis://user:{SECRET}@cache.example:6380/1?timeout=0.2"
SHOWN = "redis://cache.example:6380/1"

needs_redis = pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server")


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ['"kv"', '["kv"]'])
def test_one_place_may_stand_alone(given, tmp_path):
    (tmp_path / "server.toml").write_text(f'model = "m"\nstore = {given}\n')
    settings = Settings.load(tmp_path / "server.toml")
    assert [place.text for place in settings.store] == ["kv"] and str(settings.folder) == "kv"


def test_several_places_come_from_flags_variable_and_file(tmp_path, monkeypatch):
    file = tmp_path / "server.toml"
    file.write_text('model = "m"\nstore = ["a", "s3://bucket/x"]\n')
    assert [str(place) for place in Settings.load(file).store] == ["a", "s3://bucket/x"]
    monkeypatch.setenv("KVGRAPH_STORE", "redis://h/0")
    assert [str(place) for place in Settings.load(file).store] == ["redis://h/0"]
    monkeypatch.setenv("KVGRAPH_STORE", f'["{URL}", "kv"]')
    assert [str(place) for place in Settings.load(file).store] == [SHOWN, "kv"]
    assert [str(place) for place in Settings.load(file, store=["x", "y"]).store] == ["x", "y"]
    monkeypatch.setenv("KVGRAPH_STORE", "")
    assert Settings.load(file).store == []


def test_a_dump_of_the_settings_shows_no_password(monkeypatch):
    monkeypatch.setenv("KVGRAPH_STORE", URL)
    settings = Settings.load(None, model="m")
    assert settings.store[0].text == URL
    for text in (repr(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert SECRET not in text and SHOWN in text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (f"redis://user:{SECRET}/x@h/0", "can't be read"),
        (f'["{URL}", 5]', "JSON list"),
        ("[", "JSON list"),
    ],
)
def test_a_wrong_place_is_one_line_without_its_password(value, said, monkeypatch):
    monkeypatch.setenv("KVGRAPH_STORE", value)
    with pytest.raises(SettingsError, match=f"KVGRAPH_STORE.*{said}") as error:
        Settings.load(None, model="m")
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [5, [5], {"a": "b"}])
def test_a_place_is_text(value, tmp_path):
    (tmp_path / "server.toml").write_text(
        f'model = "m"\nstore = {"{a = 1}" if isinstance(value, dict) else json.dumps(value)}\n'
    )
    with pytest.raises(SettingsError, match="must be a folder or a URL"):
        Settings.load(tmp_path / "server.toml")


def test_an_unknown_codec_is_refused():
    with pytest.raises(SettingsError, match="setting codec .--codec.: .*there is no codec 'zip'"):
        Settings.load(None, model="m", codec="zip")


def test_where_the_library_is(tmp_path, caplog):
    """A SQLite file is on this machine, whatever the tiers are."""

    def of(*places: str, **settings):
        return library_place(Settings.load(None, model="m", store=list(places), **settings))

    kv, own = str(tmp_path / "kv"), tmp_path / "own.sqlite"
    assert of(kv) == of("redis://h/0", kv) == of(kv, "other") == tmp_path / "kv" / "library.sqlite"
    assert of("redis://h/0", library=own) == of(kv, library=own) == of(library=own) == own
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "kvgraph.server"):
        assert of() is None and not caplog.records
        assert of("redis://h/0") is None
    assert "in memory" in caplog.text and "--library" in caplog.text


# -- a live server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(model, monkeypatch):
    """Start a server of given places, its settings read as `kvgraph serve` reads them: started("kv", "redis://…")."""
    monkeypatch.setattr("kvgraph.server.state.load_model", lambda *_, **__: model)

    def start(*places: str, **settings) -> Engine:
        return load_engine(Settings.load(None, model="m", store=list(places), kv_budget=1 << 28, **settings))

    yield start
    gc.unfreeze()


def test_garbage_is_not_searched_for_among_what_was_loaded(started):
    """A search through a million objects stops every answer for 0.3 seconds."""
    gc.unfreeze()  # what other tests' servers froze
    engine = started()
    assert gc.get_freeze_count() > 10_000
    assert not any(held is engine.model for held in gc.get_objects())


@needs_redis
def test_tenants_reach_every_tier(started, redis_server, tmp_path):
    """Two tenants, a folder and Redis: in both, what one of them asked for is its own, and only its own is forgotten."""
    redis_server.client().flushall()
    engine = started(str(tmp_path / "kv"), redis_server.url, codec="zstd")
    app = application(engine, api_keys=KEYS)
    with serving(app) as url:
        server = Live(app, url)
        for caller in (ANNA, BEN):
            server.ask(caller, documents=DOCUMENTS, kvgraph={"method": "block"})
        body = {"segments": [{"id": "s", "text": "A text of Anna's that is stored."}]}
        assert httpx.put(f"{url}/v1/segments", json=body, headers=ANNA).status_code == 200
        engine.flush()
        disk, redis = engine.store.tiers
        tenants = {tenant_id(key["tenant"]) for key in KEYS}
        rows = disk.ls()
        assert {row.tenant for row in rows} == tenants and {row.codec for row in rows} == {"zstd"}
        assert set(redis._remote.spaces()) == {Space(engine.fingerprint, tenant) for tenant in tenants}
        views = {tenant_id(name): redis.for_tenant(name) for name in ("anna", "ben")}
        for tenant, view in views.items():
            assert set(dict(view.records())) == {row.key for row in rows if row.tenant == tenant}
        before = {tenant: len(dict(view.records())) for tenant, view in views.items()}
        assert httpx.delete(f"{url}/v1/segments/s", headers=ANNA).status_code == 200
        engine.flush()
        after = {tenant: len(dict(view.records())) for tenant, view in views.items()}
        assert after == before | {tenant_id("anna"): before[tenant_id("anna")] - 1}
        assert len(disk.ls()) == len(rows) - 1
        found = server.metrics()
        assert found['kvgraph_store_written_bytes_total{tier="redis"}'] > 0
        assert found['kvgraph_store_available{tier="redis"}'] == found['kvgraph_store_available{tier="disk"}'] == 1
        assert not any(name in httpx.get(f"{url}/metrics").text for name in ("anna", "ben", *tenants))


@needs_redis
def test_another_server_reads_what_this_one_wrote(started, redis_server, run):
    """Loads are counted by tier, with their bytes and times."""
    redis_server.client().flushall()
    answers = []
    for tier in (None, "redis"):
        app = application(started(redis_server.url))
        with serving(app) as url:
            server = Live(app, url)
            answer = server.ask(documents=DOCUMENTS, temperature=0, kvgraph={"method": "block"}).json()
            answers.append(answer["choices"][0]["text"])
            server.server.engine.flush()
            if tier is None:
                assert not answer["usage"]["kvgraph"]["reused_tokens"]
                continue
            assert answer["usage"]["kvgraph"]["reused_tokens"][tier] > 0
            found = server.metrics()
            loads = found['kvgraph_loads_total{outcome="found"}']
            assert loads == found['kvgraph_load_seconds_count{tier="redis"}'] > 0
            assert found['kvgraph_load_seconds_bucket{le="+Inf",tier="redis"}'] == loads
            assert found['kvgraph_load_seconds_sum{tier="redis"}'] > 0
            assert found['kvgraph_store_read_bytes_total{tier="redis"}'] > 0
            assert found["kvgraph_loads_pending"] == found["kvgraph_store_writes_pending"] == 0
            code, out, _ = run("store", "stats", "--store", redis_server.url, "--server", url, "--json")
            counts = json.loads(out)["tiers"][tier]
            assert code == 0 and counts["hits"] == found['kvgraph_store_hits_total{tier="redis"}'] > 0
            said = run("store", "stats", "--store", redis_server.url, "--server", url)[1].splitlines()[-1]
            assert re.fullmatch(r"redis: [\d.]+ % of \d+ found, .* read, .* written", said)
    assert answers[0] == answers[1]


def test_a_dead_tier_is_seen_in_metrics_and_its_password_nowhere(started, caplog, tmp_path):
    port = 1  # nothing listens there
    with caplog.at_level(logging.DEBUG):
        engine = started(f"redis://user:{SECRET}@127.0.0.1:{port}/0?timeout=0.2", str(tmp_path / "kv"))
        app = application(engine)
        with serving(app) as url:
            server = Live(app, url)
            for _ in range(2):
                assert server.ask(documents=DOCUMENTS, kvgraph={"method": "block"}).status_code == 200
            engine.flush()
            found = server.metrics()
            page = httpx.get(f"{url}/metrics").text
    assert found['kvgraph_store_available{tier="redis"}'] == 0 and found['kvgraph_store_available{tier="disk"}'] == 1
    assert found['kvgraph_store_errors_total{tier="redis"}'] >= 3 and found["kvgraph_store_write_errors_total"] > 0
    assert SECRET not in caplog.text + page + repr(engine.store_error) and "127.0.0.1:1" in str(engine.store_error)
