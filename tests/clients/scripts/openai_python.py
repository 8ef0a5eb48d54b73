"""openai: models, chats, completions, streams, structured output, responses."""

import os
from typing import Literal

from openai import NotFoundError, OpenAI
from pydantic import BaseModel


class Light(BaseModel):
    colour: Literal["red", "green"]
    on: bool


client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="none", max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
messages = [{"role": "user", "content": "Name a ship."}]
short = {"max_tokens": 5, "temperature": 0}

answer = client.chat.completions.create(model=model, messages=messages, **short)
chunks = list(
    client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **short
    )
)
text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
assert text == answer.choices[0].message.content, text
assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
with client.chat.completions.stream(model=model, messages=messages, **short) as stream:
    assert "".join(event.delta for event in stream if event.type == "content.delta") == text
parsed = client.chat.completions.parse(model=model, messages=messages, response_format=Light, max_tokens=200)
assert isinstance(parsed.choices[0].message.parsed, Light), parsed
completion = client.completions.create(model=model, prompt="A ship", logprobs=2, **short)
assert len(completion.choices[0].logprobs.tokens) == completion.usage.completion_tokens

response = client.responses.create(model=model, input="Name a ship.", max_output_tokens=5, temperature=0)
assert response.output_text == text
again = client.responses.create(model=model, input="More?", previous_response_id=response.id, max_output_tokens=5)
assert again.usage.input_tokens_details.cached_tokens > 0
light = client.responses.parse(model=model, input="A light", text_format=Light, max_output_tokens=200).output_parsed
assert isinstance(light, Light), light
events = list(client.responses.create(model=model, input="Hi", max_output_tokens=5, stream=True))
assert (events[0].type, events[-1].type.rpartition(".")[0]) == ("response.created", "response")
client.responses.delete(response.id)
try:
    client.responses.retrieve(response.id)
except NotFoundError as error:
    assert error.code == "response_not_found"
else:
    raise AssertionError("it is still there")
