"""Segments of a stored graph found for a question: searched by request, given to the model by `kvgraph.retrieve`, cited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

import serving
from embedders import Words
from kvgraph import demo
from kvgraph.data.library import Library, StoredSegment
from kvgraph.data.retrieval import RetrievalError, SearchIndex
from kvgraph.data.retrieval import stored as stored_indexes
from kvgraph.data.retrieval.stored import GraphIndexes, index_folder
from kvgraph.engine.engine import Engine
from kvgraph.methods import GraphKV
from kvgraph.server import state
from serving import events
from serving import until as wait_until

TEXTS = {
    "cape": ("Lighthouse", "The lighthouse stands on the north cape. It was built of basalt."),
    "ships": ("Ships", "Ships pass the cape at night and look for its light."),
    "basalt": ("Basalt", "Basalt is a dark stone of volcanoes."),
    "bread": ("Bread", "Bread is baked in an oven."),
}
EDGES = [["basalt", "cape"], ["cape", "ships"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    return folder


def store(http: httpx.Client, id: str = "sea", **more) -> None:
    segments = [{"id": name, "title": title, "text": text} for name, (title, text) in TEXTS.items()]
    answer = http.post("/v1/graphs", json={"id": id, "segments": segments, "edges": EDGES, "rounds": 2} | more)
    assert answer.status_code == 202, answer.text
    wait_until(lambda: http.get(f"/v1/graphs/{id}").json()["state"] == "ready", 60)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("place") / "store"


@pytest.fixture(scope="module")
def http(model, place) -> Iterator[httpx.Client]:
    """A server with a store on disk and one graph, all of it encoded."""
    engine = Engine.load(model, check=False, store=place, kv_budget=1 << 28)
    with serving.serve(engine, served_name="tiny", store=place) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            store(client)
            yield client


def search(http: httpx.Client, query: str, graph: str = "sea", **more) -> list[dict]:
    answer = http.post(f"/v1/graphs/{graph}/search", json={"query": query} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def chat(http: httpx.Client, *said: str, **more) -> dict:
    """A conversation whose turns are the user's and the assistant's in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | more
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def retrieve(count: int, graph: str = "sea") -> dict:
    return {"kvgraph": {"graph": graph, "retrieve": count}}


def test_a_graph_is_searched(http, place):
    found = search(http, "Where do ships pass?")
    assert [hit["id"] for hit in found][:2] == ["ships", "cape"]
    assert found[0]["title"] == "Ships" and found[0]["text"] == TEXTS["ships"][1]
    assert found[0]["tokens"] == len("Ships\n" + TEXTS["ships"][1] + "\n\n")
    assert [hit["id"] for hit in search(http, "Where do ships pass?", top=1)] == ["ships"]
    assert [hit["id"] for hit in search(http, "bread")] == ["bread"]
    assert search(http, "zebra") == []
    short = min(len(f"{title}\n{text}\n\n") for title, text in TEXTS.values())
    assert [hit["id"] for hit in search(http, "bread ships", tokens=short)] == ["bread"]
    assert (index_folder(place, "", "sea", fingerprint(http)) / "index.json").is_file()  # kept for the next start


def test_an_edge_leads_to_what_no_word_finds(http):
    (first, second) = search(http, "night", top=2)
    assert (first["id"], second["id"], second["via"]) == ("ships", "cape", "ships")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/graphs/none/search", {"query": "x"}, 404, None),
        ("/v1/graphs/sea/search", {"query": ""}, 400, "query"),
        ("/v1/graphs/sea/search", {"query": "x", "top": 0}, 400, "top"),
        ("/v1/graphs/sea/search", {"query": "x", "more": 1}, 400, "more"),
        ("/v1/chat/completions", {"kvgraph": {"retrieve": 2}}, 400, "kvgraph.retrieve"),
        ("/v1/chat/completions", {"kvgraph": {"graph": "none", "retrieve": 2}}, 404, "kvgraph.graph"),
        ("/v1/chat/completions", {"kvgraph": {"graph": "sea", "retrieve": 0}}, 400, "kvgraph.retrieve"),
        (
            "/v1/chat/completions",
            {"kvgraph": {"graph": "sea", "retrieve": 2, "segments": ["cape"]}},
            400,
            "kvgraph.retrieve",
        ),
        (
            "/v1/chat/completions",
            {**retrieve(2), "messages": [{"role": "system", "content": "x"}]},
            400,
            "kvgraph.retrieve",
        ),
        ("/v1/completions", {**retrieve(2), "prompt": ["a", "b"]}, 400, "kvgraph.retrieve"),
        ("/v1/completions", {**retrieve(2), "prompt": [1, 2]}, 400, "kvgraph.retrieve"),
    ],
)
def test_what_cannot_be_searched_is_refused(http, path, body, status, param):
    if path == "/v1/chat/completions":
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}]} | body
    elif path == "/v1/completions":
        body = {"model": "tiny"} | body
    refused = serving.error(http.post(path, json=body), status)
    assert refused["param"] == param


def test_a_chat_reads_what_was_found_and_cites_it(http):
    chat(http, "bread?", **retrieve(1))  # computes what stands before documents in every chat
    answer = chat(http, "Where do ships pass?", **retrieve(2))
    assert [(c["id"], c["title"]) for c in answer["citations"]] == [("ships", "Ships"), ("cape", "Lighthouse")]
    used = answer["usage"]["kvgraph"]
    assert used["document_tokens_computed"] == 0 and used["method"] == "graph-kv"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    named = chat(http, "Where do ships pass?", kvgraph={"graph": "sea", "segments": ["ships", "cape"]})
    assert named["choices"] == answer["choices"] and "citations" not in named
    assert named["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert chat(http, "zebra?", **retrieve(2))["citations"] == []


def test_a_plain_prompt_reads_what_was_found(http):
    body = {"model": "tiny", "prompt": "Where do ships pass?", "max_tokens": 2} | retrieve(1)
    answer = http.post("/v1/completions", json=body).json()
    assert [c["id"] for c in answer["citations"]] == ["ships"]
    assert answer["usage"]["kvgraph"]["document_tokens_computed"] == 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_cites_at_its_end(http, n):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Where do ships pass?"}], "stream": True, "n": n}
    text = http.post("/v1/chat/completions", json=body | retrieve(2) | {"max_tokens": 3, "ignore_eos": True}).text
    *chunks, done = events(text)
    assert done == "[DONE]"
    assert [c["id"] for c in chunks[-1]["citations"]] == ["ships", "cape"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("citations" in chunk for chunk in chunks[:-1])


def test_a_later_turn_finds_the_documents_of_earlier_ones_in_the_store(http):
    """Only what was said is computed."""
    first = chat(http, "Where do ships pass?", **retrieve(2))
    said = first["choices"][0]["message"]["content"]
    turns = ["Where do ships pass?", said, "And what is bread?"]
    second = chat(http, *turns, **retrieve(1))
    assert [c["id"] for c in second["citations"]] == ["bread"]
    again = chat(http, *turns, "Baked.", "Do ships pass at night?", **retrieve(2))
    assert {c["id"] for c in again["citations"]} == {"ships", "cape"}
    for answer, before in ((second, turns[:2]), (again, [*turns, "Baked."])):
        spoken = sum(len(f"assistant: {text}\n\n".encode()) for text in before) + len("user: ")
        assert answer["usage"]["kvgraph"]["document_tokens_computed"] <= spoken
    documents = sum(len(f"{TEXTS[id][0]}\n{TEXTS[id][1]}\n\n") for id in ("ships", "cape"))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= documents


def test_the_plan_shows_what_would_be_read(http):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Where do ships pass?"}]} | retrieve(2)
    answer = http.post("/v1/plan", json=body)
    assert answer.status_code == 200, answer.text


def test_searching_does_not_run_on_the_event_loop(http, monkeypatch):
    """The search runs on a thread that has no event loop."""
    seen = []
    before = SearchIndex.search

    def noting(self, *arguments, **more):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append(threading.current_thread().name)
        return before(self, *arguments, **more)

    monkeypatch.setattr(SearchIndex, "search", noting)
    search(http, "ships")
    chat(http, "ships?", **retrieve(1))
    assert len(seen) == 2 and all(name.startswith("kvgraph-worker") for name in seen)


def test_an_index_with_embeddings_is_used(model, tmp_path, monkeypatch):
    """As `kvgraph index` leaves it; the model is the one that the index names."""
    place = tmp_path / "store"
    asked = []

    def load(name: str) -> Words:
        asked.append(name)
        return Words()

    monkeypatch.setattr(state, "SentenceEmbedder", load)
    with serving.serve(model, served_name="tiny", store=place) as url, httpx.Client(base_url=url, timeout=60) as http:
        store(http)
        assert search(http, "volcanoes of stone")[0]["id"] == "basalt" and asked == []
        (app_library,) = (Library(place / "library.sqlite", fingerprint(http)),)
        graph, home = app_library.graph("", "sea"), index_folder(place, "", "sea", fingerprint(http))
        SearchIndex.build(home, app_library.texts(graph), Words())
        app_library.close()
        found = search(http, "nothing of these", top=4)  # words that no text has; vectors find all
        assert len(found) == 4 and asked == ["words"]
        assert http.delete("/v1/graphs/sea").status_code == 200
        assert not home.exists()


def fingerprint(http: httpx.Client) -> str:
    return http.get("/v1/models").json()["data"][0]["kvgraph"]["fingerprint"]


def test_a_server_without_a_store_searches_too(model):
    with serving.serve(model, served_name="tiny") as url, httpx.Client(base_url=url, timeout=60) as http:
        store(http)
        assert search(http, "bread")[0]["id"] == "bread"
        assert chat(http, "bread?", **retrieve(1))["citations"][0]["id"] == "bread"


def test_tenants_search_their_own_graphs(model, tmp_path):
    keys = [{"key": "key-of-alice", "tenant": "alice"}, {"key": "key-of-bob", "tenant": "bob"}]
    with serving.serve(model, served_name="tiny", store=tmp_path / "s", api_keys=keys) as url:
        with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer key-of-alice"}) as http:
            store(http)
            assert search(http, "bread")[0]["id"] == "bread"
            assert index_folder(tmp_path / "s", "alice", "sea", fingerprint(http)).is_dir()
            http.headers["Authorization"] = "Bearer key-of-bob"
            assert http.post("/v1/graphs/sea/search", json={"query": "bread"}).status_code == 404


# The indexes of a library, without a server


@pytest.fixture
def library(tmp_path) -> Iterator[Library]:
    made = library_of(tmp_path, "model", TEXTS)
    yield made
    made.close()


def library_of(folder: Path, model: str, ids: Iterable[str]) -> Library:
    """A model's library with a graph "sea" of some of the texts."""
    made, ids = Library(folder / "library.sqlite", model), list(ids)
    made.add("", [StoredSegment(id, (1, 2, 3), *TEXTS[id]) for id in ids], 9)
    pairs = [(ids.index(source), ids.index(reader)) for source, reader in EDGES if {source, reader} <= {*ids}]
    made.add_graph("", "sea", GraphKV(), ids, pairs, spans=1, tokens=1)
    return made


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_two_models_index_graphs_of_one_name(library, tmp_path, shared):
    """What one does, the other doesn't notice, also with an index made when models shared the folder."""
    graph, own = library.graph("", "sea"), index_folder(tmp_path, "", "sea", "" if shared else "model")
    SearchIndex.build(own, library.texts(graph), Words())
    indexes = GraphIndexes(library, tmp_path, lambda name: Words())
    assert indexes.of(graph).embedder == "words"
    theirs = library_of(tmp_path, "another", ["bread"])
    their_graph, their_indexes = theirs.graph("", "sea"), GraphIndexes(theirs, tmp_path, lambda name: Words())
    assert [hit.id for hit in their_indexes.search(their_graph, "bread ships", 4)] == ["bread"]
    theirs.remove_graph(their_graph)
    their_indexes.forget(their_graph)
    theirs.close()
    assert not index_folder(tmp_path, "", "sea", "another").exists()
    assert indexes.of(graph).embedder == "words"
    library.remove_graph(graph)
    indexes.forget(graph)
    assert not own.exists()


def test_an_index_of_other_segments_is_left_alone(library, tmp_path, caplog):
    graph, home = library.graph("", "sea"), index_folder(tmp_path, "", "sea", "model")
    SearchIndex.build(home, library.texts(graph)[:2])
    indexes = GraphIndexes(library, tmp_path, Words)
    assert [hit.id for hit in indexes.search(graph, "bread", 2)] == ["bread"]
    assert "is of other segments" in caplog.text and len(SearchIndex.open(home)) == 2
    indexes.close()


def test_a_model_that_is_gone_leaves_the_words(library, tmp_path, caplog):
    graph = library.graph("", "sea")
    SearchIndex.build(index_folder(tmp_path, "", "sea", "model"), library.texts(graph), Words())

    def gone(name: str):
        raise RetrievalError(f"can't load the retriever {name}")

    indexes = GraphIndexes(library, tmp_path, gone)
    assert [hit.id for hit in indexes.search(graph, "bread", 3)] == ["bread"]
    assert "can't load the retriever words; words alone are searched" in caplog.text


def test_a_new_index_is_seen_and_few_stay_open(library, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_indexes, "OPEN", 2)
    graph = library.graph("", "sea")
    indexes = GraphIndexes(library, tmp_path, lambda name: Words())
    first = indexes.of(graph)
    assert indexes.of(graph) is first
    SearchIndex.build(index_folder(tmp_path, "", "sea", "model"), library.texts(graph), Words())
    assert indexes.of(graph) is not first and indexes.of(graph).embedder == "words"
    for name in "abc":
        library.add_graph("", name, GraphKV(), ["bread"], [], spans=1, tokens=1)
        assert indexes.search(library.graph("", name), "bread", 1)[0].id == "bread"
    assert len(indexes._open) == 2


def test_a_graph_that_goes_while_it_is_searched_harms_nothing(library, tmp_path, monkeypatch):
    graph, indexes = library.graph("", "sea"), GraphIndexes(library, tmp_path, lambda name: Words())
    opened, stamp = indexes.of(graph), stored_indexes._stamp(index_folder(tmp_path, "", "sea", "model"))

    def forgetting(folder: Path):
        indexes.forget(graph)  # as by another thread
        return stamp

    monkeypatch.setattr(stored_indexes, "_stamp", forgetting)
    assert indexes.of(graph) is opened and not indexes._open


def test_what_reads_what(library):
    graph = library.graph("", "sea")
    assert library.members(graph) == list(TEXTS)
    assert {id: library.sources(graph, id) for id in [*TEXTS, "none"]} == {
        "cape": ["basalt"],
        "ships": ["cape"],
        "basalt": [],
        "bread": [],
        "none": [],
    }
    assert [segment.text for segment in library.texts(graph)] == [text for _, text in TEXTS.values()]
