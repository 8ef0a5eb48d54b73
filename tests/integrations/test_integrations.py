"""LangChain, LlamaIndex and Open WebUI against a live server with a stored graph."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving
from kvgraph import demo
from soak import SOAK

TEXTS = {
    "cape": ("Lighthouse", "The lighthouse stands on the north cape."),
    "ships": ("Ships", "Ships pass the cape at night and look for its light."),
    "bread": ("Bread", "Bread is baked in an oven."),
}
QUESTION = "Where do ships pass?"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("model")
    demo.write_model(folder)
    with serving.serve(folder, served_name="tiny", default_max_tokens=8) as url:
        segments = [{"id": id, "title": title, "text": text} for id, (title, text) in TEXTS.items()]
        body = {"id": "sea", "segments": segments, "edges": [["cape", "ships"]]}
        assert httpx.post(f"{url}/v1/graphs", json=body).status_code == 202
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/v1/graphs/sea").json()["state"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield url


# LangChain


@pytest.fixture(scope="module")
def chat(url):
    pytest.importorskip("langchain_openai", reason="no langchain-openai: pip install 'kvgraph[langchain]'")
    from kvgraph.integrations.langchain import ComposedChat

    return ComposedChat(model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=5)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all: a chat keeps its connections."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def retriever(url):
    pytest.importorskip("langchain_openai", reason="no langchain-openai: pip install 'kvgraph[langchain]'")
    from kvgraph.integrations.langchain import StoredGraphRetriever

    return StoredGraphRetriever(url=url, graph="sea", k=2)


def sent(url: str, **more) -> str:
    """What the server answers to a plain request."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 5}
    return httpx.post(f"{url}/v1/chat/completions", json=body | more).json()["choices"][0]["message"]["content"]


def test_a_chain_of_retriever_and_chat_hands_documents_over(url, chat, retriever):
    found = retriever.invoke(QUESTION)
    assert [document.id for document in found] == ["ships", "cape"]
    assert found[0].page_content == TEXTS["ships"][1] and found[0].metadata["title"] == "Ships"
    answer = chat.invoke(QUESTION, documents=found)
    assert answer.content == sent(url, documents=[{"segment": "ships"}, {"segment": "cape"}]) != sent(url)
    assert chat.bind(documents=found).invoke(QUESTION).content == answer.content
    assert "".join(chunk.content for chunk in chat.stream(QUESTION, documents=found)) == answer.content
    assert asyncio.run(retriever.ainvoke(QUESTION)) == found


def test_other_documents_are_sent_as_texts(url, chat):
    from langchain_core.documents import Document

    given = [Document("Ada wrote it.", metadata={"title": "Ada"}, id="a"), Document("For a machine.")]
    answer = chat.invoke(QUESTION, documents=given, composed={"method": "block"})
    documents = [{"id": "a", "title": "Ada", "text": "Ada wrote it."}, {"text": "For a machine."}]
    assert answer.content == sent(url, documents=documents, kvgraph={"method": "block"})


def test_the_server_finds_documents_for_langchain(url, chat):
    composed = {"graph": "sea", "retrieve": 2}
    answer = chat.invoke(QUESTION, composed=composed)
    assert [c["id"] for c in answer.response_metadata["citations"]] == ["ships", "cape"]
    assert answer.content == sent(url, kvgraph=composed)
    whole = None
    for chunk in chat.stream(QUESTION, composed=composed):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == answer.content
    assert [c["id"] for c in whole.response_metadata["citations"]] == ["ships", "cape"]
    assert "citations" not in chat.invoke(QUESTION).response_metadata


def test_langchain_standard_tests_of_retrievers(url, retriever):
    """Those of langchain-tests, called one by one: its pytest plugins aren't needed."""
    standard = pytest.importorskip("langchain_tests.integration_tests.retrievers", reason="no langchain-tests")
    from kvgraph.integrations.langchain import StoredGraphRetriever

    class Tests(standard.RetrieversIntegrationTests):
        retriever_constructor = StoredGraphRetriever
        retriever_constructor_params = {"url": url, "graph": "sea"}
        retriever_query_example = "ships, cape, bread"

    tests = Tests()
    tests.test_k_constructor_param()
    tests.test_invoke_with_k_kwarg(retriever)
    tests.test_invoke_returns_documents(retriever)
    asyncio.run(tests.test_ainvoke_returns_documents(retriever))


SHORT = ("test_invoke", "test_stream", "test_conversation", "test_usage_metadata")
MORE = ("test_batch", "test_double_messages_conversation", "test_usage_metadata_streaming", "test_message_with_name")
AWAITED = ("test_ainvoke", "test_astream", "test_abatch")


@pytest.mark.parametrize("name", SHORT + ((*MORE, *AWAITED) if SOAK else ()))
def test_langchain_standard_tests_of_chat_models(chat, loop, name):
    standard = pytest.importorskip("langchain_tests.integration_tests.chat_models", reason="no langchain-tests")
    from kvgraph.integrations.langchain import ComposedChat

    class Tests(standard.ChatModelIntegrationTests):
        chat_model_class = ComposedChat

    ran = getattr(Tests(), name)(chat)
    if name in AWAITED:
        loop.run_until_complete(ran)


# LlamaIndex


def test_a_query_engine_of_llamaindex_hands_documents_over(url):
    pytest.importorskip("llama_index.core", reason="no llama-index-core: pip install 'kvgraph[llamaindex]'")
    from llama_index.core.query_engine import RetrieverQueryEngine

    from kvgraph.integrations.llamaindex import ComposedAnswers, StoredGraphNodes

    nodes = StoredGraphNodes(url, "sea", top=2)
    found = nodes.retrieve(QUESTION)
    assert [node.node_id for node in found] == ["ships", "cape"] and found[0].text == TEXTS["ships"][1]
    answers = ComposedAnswers(url, "tiny", {"method": "block"}, temperature=0, max_tokens=5)
    texts = [node.get_content(metadata_mode="llm") for node in found]
    expected = sent(url, documents=[{"text": text} for text in texts], kvgraph={"method": "block"})
    made = RetrieverQueryEngine(nodes, answers).query(QUESTION)
    assert str(made) == expected and [node.node_id for node in made.source_nodes] == ["ships", "cape"]
    assert asyncio.run(answers.aget_response(QUESTION, texts)) == expected
    streaming = ComposedAnswers(url, "tiny", {"method": "block"}, streaming=True, temperature=0, max_tokens=5)
    assert "".join(streaming.get_response(QUESTION, texts)) == expected


# Open WebUI


def test_the_function_of_open_webui(url):
    from kvgraph.integrations.open_webui import Pipe

    pipe, events = Pipe(), []
    pipe.valves = Pipe.Valves(url=url, graph="sea", retrieve=2)
    assert pipe.pipes() == [{"id": "sea", "name": "kvgraph: sea"}]

    async def emit(event: dict) -> None:
        events.append(event)

    async def answered(body: dict) -> str:
        return "".join([piece async for piece in pipe.pipe(body, emit)])

    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 5, "stream": True, "model": "kvgraph.sea"}
    assert asyncio.run(answered(body)) == sent(url, kvgraph={"graph": "sea", "retrieve": 2})
    assert [event["data"]["source"]["name"] for event in events] == ["Ships", "Lighthouse"]
    pipe.valves.graph = "land"
    assert asyncio.run(answered(body)).startswith("kvgraph: there is no graph 'land'")


def test_the_file_of_open_webui_stands_alone():
    """It is pasted, so it imports nothing of this package."""
    source = (Path(demo.__file__).parents[1] / "integrations" / "open_webui.py").read_text()
    assert "import kvgraph" not in source and "from kvgraph" not in source
