"""LangChain: a chat model that hands documents over as documents, and a retriever over a stored graph.

    pip install 'kvgraph[langchain]'

Documents that are pasted into a prompt are prefilled for every question. Handed over apart, each is encoded once.

    retriever = StoredGraphRetriever(url="http://127.0.0.1:8771", graph="docs", k=5)
    model = ComposedChat(model="llama", base_url="http://127.0.0.1:8771/v1", api_key="none")
    model.invoke("Who dug the harbour?", documents=retriever.invoke("Who dug the harbour?"))

or the server finds them itself, and reads the graph's own encodings:

    model = ComposedChat(model="llama", base_url=..., api_key="none", composed={"graph": "docs", "retrieve": 5})
    model.invoke("Who dug the harbour?").response_metadata["citations"]
"""

from __future__ import annotations

from typing import Any

import httpx
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_openai import ChatOpenAI
from pydantic import Field, SecretStr

SEGMENT = "segment"  # in a document's metadata: the stored segment that it is
TIMEOUT = 60.0  # seconds for a search


class ComposedChat(ChatOpenAI):
    """A chat with `kvgraph serve`: OpenAI's, with `documents` and the options of the `kvgraph` object.

    composed: these options, such as {"method": "graph-kv", "edges": "chain"} or {"graph": "docs", "retrieve": 5}.
    `invoke`, `stream` and `bind` take `documents`, and `composed` for one request. What was found is in the answer's
    `response_metadata["citations"]`.
    """

    composed: dict[str, Any] = Field(default_factory=dict)
    stream_usage: bool | None = True  # LangChain leaves it out for servers that may not know it

    @property
    def _llm_type(self) -> str:
        return "kvgraph"

    def _get_request_payload(self, input_: Any, *, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        documents, composed = kwargs.pop("documents", ()), self.composed | kwargs.pop("composed", {})
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        more = dict(payload.get("extra_body") or {})
        if documents:
            more["documents"] = [_as_sent(document) for document in documents]
        if composed:
            more["kvgraph"] = composed
        return payload | ({"extra_body": more} if more else {})

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        found = response if isinstance(response, dict) else response.model_dump()
        if found.get("citations") is not None:
            for generation in result.generations:
                generation.message.response_metadata["citations"] = found["citations"]
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if made is not None and chunk.get("citations") is not None:
            made.message.response_metadata["citations"] = chunk["citations"]
        return made


class StoredGraphRetriever(BaseRetriever):
    """The segments of a stored graph that a question is about (`POST /v1/graphs/{id}/search`).

    url: of the server. k: how many. Each document's metadata has its `title`, `score`, and `segment`, by which a
    `ComposedChat` names it to the server instead of sending its text. Raises httpx.HTTPStatusError.
    """

    url: str
    graph: str
    k: int = 5
    api_key: SecretStr | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        with httpx.Client(timeout=TIMEOUT) as client:
            return _documents(client.post(**self._request(query, k)))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        async with httpx.AsyncClient(timeout=TIMEOUT) as client:
            return _documents(await client.post(**self._request(query, k)))

    def _request(self, query: str, k: int | None) -> dict[str, Any]:
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key.get_secret_value()}"}
        return {
            "url": f"{self.url.rstrip('/')}/v1/graphs/{self.graph}/search",
            "json": {"query": query, "top": self.k if k is None else k},
            "headers": key,
        }


def _documents(answer: httpx.Response) -> list[Document]:
    answer.raise_for_status()
    return [
        Document(
            found["text"],
            id=found["id"],
            metadata={SEGMENT: found["id"], "title": found["title"], "score": found["score"]},
        )
        for found in answer.json()["data"]
    ]


def _as_sent(document: Document) -> dict[str, Any]:
    """A document as the server takes it."""
    if SEGMENT in document.metadata:
        return {SEGMENT: document.metadata[SEGMENT]}
    names = {"id": document.id, "title": document.metadata.get("title")}
    return {"text": document.page_content} | {name: str(value) for name, value in names.items() if value}
