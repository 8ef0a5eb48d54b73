"""
title: kvgraph
description: Answers over a stored graph of `kvgraph serve`, with citations.
requirements: httpx
"""

# A function of Open WebUI: paste this file under Admin Panel, Functions. It needs nothing of kvgraph's package.

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from pydantic import BaseModel

SENT = ("messages", "temperature", "top_p", "max_tokens", "seed", "stop")  # of what Open WebUI sends


class Pipe:
    """A model in Open WebUI, whose name is that of the graph it answers from."""

    class Valves(BaseModel):
        """What an administrator sets. retrieve: how many segments to find for a question."""

        url: str = "http://127.0.0.1:8771"
        api_key: str = ""
        graph: str = "docs"
        retrieve: int = 5
        timeout: float = 600.0

    def __init__(self) -> None:
        self.valves = self.Valves()

    def pipes(self) -> list[dict[str, str]]:
        """The models to choose from."""
        return [{"id": self.valves.graph, "name": f"kvgraph: {self.valves.graph}"}]

    async def pipe(
        self, body: dict[str, Any], __event_emitter__: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    ) -> AsyncIterator[str]:
        """The answer piece by piece; its citations become sources of the message."""
        headers = {"Authorization": f"Bearer {self.valves.api_key}"} if self.valves.api_key else {}
        async with httpx.AsyncClient(
            base_url=self.valves.url.rstrip("/"), headers=headers, timeout=self.valves.timeout
        ) as client:
            models = (await client.get("/v1/models")).raise_for_status().json()
            asked = {name: body[name] for name in SENT if body.get(name) is not None}
            asked |= {"model": models["data"][0]["id"], "stream": True}
            asked["kvgraph"] = {"graph": self.valves.graph, "retrieve": self.valves.retrieve}
            async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                if answer.is_error:
                    await answer.aread()
                    yield f"kvgraph: {answer.json()['error']['message']}"
                    return
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        yield f"\n\nkvgraph: {chunk['error']['message']}"
                        return
                    for choice in chunk["choices"]:
                        if text := choice["delta"].get("content"):
                            yield text
                    if __event_emitter__ is not None:
                        for cited in chunk.get("citations") or ():
                            await __event_emitter__(_source(cited))


def _source(cited: dict[str, Any]) -> dict[str, Any]:
    """A citation as Open WebUI takes it."""
    name = cited["title"] or cited["id"]
    metadata = [{"source": cited["id"], "name": name}]
    return {"type": "citation", "data": {"document": [name], "metadata": metadata, "source": {"name": name}}}
