"""Ask about documents with the official client. The second question computes no document again.

kvgraph serve --model MODEL        # in another terminal
pip install openai
python examples/openai_chat.py     # KVGRAPH_URL: the server; KVGRAPH_KEY: an API key, if it has any
"""

import os

from openai import OpenAI

url = os.environ.get("KVGRAPH_URL", "http://127.0.0.1:8771")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("KVGRAPH_KEY", "none"))
model = client.models.list().data[0].id

documents = [
    {"id": "engine", "title": "Analytical Engine", "text": "Charles Babbage designed the Analytical Engine in 1837."},
    {
        "id": "notes",
        "title": "Ada Lovelace",
        "text": "In 1843 she published notes on the engine, with a program for it.",
    },
]
# What OpenAI's API doesn't have goes through extra_body. An edge [source, reader] lets a document read another one.
extra = {"documents": documents, "kvgraph": {"method": "graph-kv", "edges": [["engine", "notes"]]}}

for question in ("For which machine did Ada Lovelace write a program?", "When was it designed?"):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=64,
        extra_body=extra,
    )
    cost = answer.usage.model_extra["kvgraph"]
    print(f"{question}\n  {answer.choices[0].message.content}")
    print(f"  {cost['document_tokens_computed']} document tokens computed, reused {cost['reused_tokens']}")
