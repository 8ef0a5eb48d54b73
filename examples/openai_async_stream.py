"""Stream several answers at once with the official async client. All of them read the same documents in memory.

kvgraph serve --model MODEL               # in another terminal
pip install openai
python examples/openai_async_stream.py    # KVGRAPH_URL: the server; KVGRAPH_KEY: an API key, if it has any
"""

import asyncio
import os

from openai import AsyncOpenAI

URL = os.environ.get("KVGRAPH_URL", "http://127.0.0.1:8771")
DOCUMENTS = [
    {"title": "Cape", "text": "The lighthouse on the north cape was built in 1872."},
    {"title": "Keeper", "text": "Its first keeper was Jonas Brandt."},
]
QUESTIONS = ["When was the lighthouse built?", "Who kept it first?", "Where does it stand?"]


async def ask(client: AsyncOpenAI, model: str, question: str) -> None:
    """Print an answer as it comes, each piece on a line of its own: the answers interleave."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=32,
        stream=True,
        stream_options={"include_usage": True},  # one more chunk, without choices, that has the usage
        extra_body={"documents": DOCUMENTS, "kvgraph": {"method": "block"}},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(f"{question} {chunk.choices[0].delta.content!r}", flush=True)
        if chunk.usage:
            cost = chunk.usage.model_extra["kvgraph"]
            print(f"{question} first token after {cost['ttft'] * 1000:.0f} ms, reused {cost['reused_tokens']}")


async def main() -> None:
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("KVGRAPH_KEY", "none")) as client:
        model = (await client.models.list()).data[0].id
        await asyncio.gather(*(ask(client, model, question) for question in QUESTIONS))


asyncio.run(main())
