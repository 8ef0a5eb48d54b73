"""LlamaIndex: a retriever over a stored graph, and a synthesizer that hands what was retrieved over as documents.

pip install 'kvgraph[llamaindex]'

retriever = StoredGraphNodes("http://127.0.0.1:8771", "docs", top=5)
engine = RetrieverQueryEngine(retriever, ComposedAnswers("http://127.0.0.1:8771", "llama"))
print(engine.query("Who dug the harbour?"))
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms.mock import MockLLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from openai import AsyncOpenAI, OpenAI

DEFAULT_KEY = "none"


class StoredGraphNodes(BaseRetriever):
    """The segments of a stored graph that a question is about, as nodes (`POST /v1/graphs/{id}/search`)."""

    def __init__(self, url: str, graph: str, top: int = 5, api_key: str = DEFAULT_KEY):
        super().__init__()
        self._client = OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=api_key)
        self._graph, self._top = graph, top

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        body = {"query": query_bundle.query_str, "top": self._top}
        found: Any = self._client.post(f"/graphs/{self._graph}/search", body=body, cast_to=object)
        return [
            NodeWithScore(
                node=TextNode(id_=hit["id"], text=hit["text"], metadata={"title": hit["title"]}), score=hit["score"]
            )
            for hit in found["data"]
        ]


class ComposedAnswers(BaseSynthesizer):
    """Answers by a chat of `kvgraph serve`, to which each text that was retrieved is a document of its own.

    url: of the server. model: its name. composed: options of the `kvgraph` object, such as {"method": "block"}. more: further
    fields of the request, such as max_tokens. streaming: `query` gives the answer piece by piece.
    """

    def __init__(
        self,
        url: str,
        model: str,
        composed: dict[str, Any] | None = None,
        api_key: str = DEFAULT_KEY,
        streaming: bool = False,
        **more: Any,
    ):
        super().__init__(llm=MockLLM(), streaming=streaming)  # a synthesizer must have some model; it isn't asked
        base = f"{url.rstrip('/')}/v1"
        self._client, self._waiting = (
            OpenAI(base_url=base, api_key=api_key),
            AsyncOpenAI(base_url=base, api_key=api_key),
        )
        self._model, self._composed, self._more = model, composed or {}, more

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """The answer, or with `streaming` its pieces."""
        answer: Any = self._client.chat.completions.create(**self._request(query_str, text_chunks))
        return self._pieces(answer) if self._streaming else answer.choices[0].message.content

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """As `get_response`."""
        answer: Any = await self._waiting.chat.completions.create(**self._request(query_str, text_chunks))
        return self._apieces(answer) if self._streaming else answer.choices[0].message.content

    def _request(self, question: str, texts: Sequence[str]) -> dict[str, Any]:
        extra = {"documents": [{"text": text} for text in texts], "kvgraph": self._composed}
        messages = [{"role": "user", "content": question}]
        return {
            "model": self._model,
            "messages": messages,
            "stream": self._streaming,
            "extra_body": extra,
            **self._more,
        }

    @staticmethod
    def _pieces(answer: Any) -> Iterator[str]:
        for chunk in answer:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    @staticmethod
    async def _apieces(answer: Any) -> AsyncIterator[str]:
        async for chunk in answer:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        pass
