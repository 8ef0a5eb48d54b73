"""The library in a real Postgres: every call gives what it gives with a SQLite file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvgraph import demo
from kvgraph.data.databases import SQLite
from kvgraph.data.library import Library, LibraryError, StoredSegment
from kvgraph.errors import KVGraphError, StoreError
from kvgraph.methods import GraphKV
from kvgraph.places import StorePlace
from kvgraph.server.settings import Settings
from remotes import PostgresServer, postgres_programs
from serving import serve, until

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning")
IDS = ["b", "B", "a", "ä", "Z-1", "z_1", "0", "日本"]
EDGES = [(0, 1), (1, 2), (3, 2), (4, 5), (2, 6), (7, 7)]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[PostgresServer]:
    if postgres_programs() is None:
        pytest.skip("no Postgres here: apt-get install postgresql")
    pytest.importorskip("sqlalchemy", reason="needs kvgraph[postgres]: no library in a Postgres is tested")
    pytest.importorskip("psycopg", reason="needs kvgraph[postgres]: no library in a Postgres is tested")
    server = PostgresServer(tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


def said(call: Callable[[], object]) -> object:
    """What a call gives, or the error that it ends with."""
    try:
        return call()
    except KVGraphError as error:
        return type(error), str(error)


def story(library: Library) -> list[object]:
    """Every call, in an order in which each matters to the next."""
    segments = [StoredSegment(id, (i, -i, 2**31 - 1), f"title {i}", f"text\n{i}") for i, id in enumerate(IDS)]
    method = GraphKV(rounds=2)
    told: list[object] = [
        said(lambda: library.add("t", segments, most=8)),
        said(lambda: library.add("t", segments, most=8)),
        said(lambda: library.add("t", [StoredSegment("new", (1,))], most=8)),
        said(lambda: library.add("t", [StoredSegment("b", (9,))], most=8)),
        said(lambda: library.segments("t", "", 5)),
        said(lambda: library.segments("t", "a", 5)),
        said(lambda: library.segments("other", "", 5)),
        said(lambda: library.segment("t", "none")),
        said(lambda: library.document("t", "ä")),
        said(lambda: library.add_graph("t", "g", method, IDS, EDGES, spans=3, tokens=4)),
        said(lambda: library.add_graph("t", "g", method, IDS[::-1], EDGES, spans=3, tokens=4)),
        said(lambda: library.add_graph("t", None, method, IDS[:3], EDGES[:2], spans=1, tokens=1)),
        said(lambda: library.add_graph("t", "h", method, ["none"], [], spans=1, tokens=1)),
        said(lambda: library.add_graph("t", "h", method, IDS, EDGES, spans=1, tokens=1, most=2)),
        said(lambda: library.add_graph("t", "h", method, IDS, EDGES, spans=1, tokens=1, most_edges=20)),
        said(lambda: [library.has_elsewhere("t", "g"), library.has_elsewhere("t", "none")]),
        said(lambda: library.remove("t", "a")),
        said(lambda: [graph.id for graph in library.unfinished()]),
    ]
    graph = library.graph("t", "g")
    library.progress(graph, "failed", 2, "it broke")
    told += [
        said(lambda: library.graph("t", "g")),
        said(lambda: library.add_graph("t", "g", method, IDS, EDGES, spans=3, tokens=4)),
        said(lambda: library.part(graph)),
        said(lambda: library.part(graph, ["0", 2])),
        said(lambda: library.part(graph, ["none"])),
        said(lambda: library.members(graph)),
        said(lambda: library.texts(graph)),
        said(lambda: {id: library.sources(graph, id) for id in IDS}),
        said(lambda: [other.id for other in library.sharing(graph)]),
        said(lambda: library.graphs("t", "", 1)),
    ]
    fewer = [*segments[:2], StoredSegment("fresh", (5, 6))]
    told += [
        said(lambda: library.replace_graph("t", "g", method, fewer, [(0, 2)], spans=2, tokens=2)),
        said(lambda: [segment.id for segment in library.segments("t", "", 20)]),
        said(lambda: library.remove_graph(library.graph("t", "g"), unused_segments=True)),
        said(lambda: [segment.id for segment in library.segments("t", "", 20)]),
        said(lambda: library.graph("t", "g")),
        said(lambda: library.add("t", [StoredSegment("\ud800", (1,))], most=20)),
    ]
    return told


def test_a_library_in_postgres_says_what_one_in_a_file_says(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr("kvgraph.data.library.time.time", lambda: 1234.5678)
    with_file, with_server = Library(tmp_path / "l.sqlite", "m"), Library(StorePlace(postgres.url), "m")
    theirs, ours = story(with_server), story(with_file)
    for one, other in zip(theirs, ours, strict=True):
        assert one == other
    with_server.close()
    again = Library(StorePlace(postgres.url), "m")
    assert again.segments("t", "", 20) == with_file.segments("t", "", 20)
    assert Library(StorePlace(postgres.url), "another").segments("t", "", 20) == []


def test_two_servers_keep_no_more_than_a_tenant_may_have(postgres):
    libraries = [Library(StorePlace(postgres.url), "shared") for _ in range(2)]
    refused: list[LibraryError] = []

    def fill(library: Library, who: int) -> None:
        for i in range(20):
            try:
                library.add("t", [StoredSegment(f"{who}-{i}", (i,))], most=25)
            except LibraryError as error:
                refused.append(error)

    threads = [threading.Thread(target=fill, args=(library, i)) for i, library in enumerate(libraries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries[0].segments("t", "", 100)) == 25 and len(refused) == 15


def test_a_server_goes_on_when_its_database_has_been_away(postgres, tmp_path):
    model = tmp_path / "tiny"
    model.mkdir()
    demo.write_model(model)
    with serve(model, library=postgres.url) as url:

        def put(id: str) -> httpx.Response:
            return httpx.put(f"{url}/v1/segments", json={"segments": [{"id": id, "text": "a fact"}]}, timeout=60)

        assert put("a").status_code == 200
        postgres.stop()
        refused = put("b")
        assert refused.status_code >= 500 and "a-password" not in refused.text
        postgres.start()
        until(lambda: put("b").status_code == 200, 60)
    with serve(model, library=postgres.url) as url:
        assert [s["id"] for s in httpx.get(f"{url}/v1/segments").json()["data"]] == ["a", "b"]


def test_what_cant_be_a_database_is_said_without_its_password(postgres, tmp_path, run, monkeypatch):
    for url, reason in (
        (postgres.url.replace(str(postgres.port), "1"), "can't be used"),
        ("mysql://a:a-password@host/db", "can't keep a library|needs"),
        ("postgresql+nothing://a:a-password@host/db", "isn't a URL like"),
    ):
        with pytest.raises(StoreError, match=reason) as told:
            Library(StorePlace(url), "m")
        assert "a-password" not in str(told.value)
    code, _, err = run("serve", "--model", "m", "--library", postgres.url)
    assert code == 2 and "KVGRAPH_LIBRARY" in err and "a-password" not in err
    monkeypatch.setenv("KVGRAPH_LIBRARY", postgres.url)
    assert Settings.load(model="m").library.text == postgres.url
    monkeypatch.delenv("KVGRAPH_LIBRARY")
    assert "a-password" not in Settings.load(model="m", library=postgres.url).model_dump_json()
    assert Settings.load(model="m", library=str(tmp_path / "l.sqlite")).library.text == str(tmp_path / "l.sqlite")


def test_a_file_can_be_used_again_at_once(tmp_path: Path):
    for _ in range(2):
        SQLite(tmp_path / "l.sqlite").close()
