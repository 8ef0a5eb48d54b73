"""langchain-openai: ChatOpenAI with invoke, stream, batch and structured output, and over the Responses API."""

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Light(BaseModel):
    """A light."""

    colour: Literal["red", "green"]
    on: bool


fields = {
    "model": os.environ["MODEL"],
    "base_url": os.environ["OPENAI_BASE_URL"],
    "api_key": "none",
    "temperature": 0,
    "max_retries": 0,
}
model = ChatOpenAI(max_tokens=5, **fields)
talk = [("system", "Be brief."), ("human", "Name a ship.")]
answer = model.invoke(talk)
assert answer.usage_metadata["output_tokens"] == 5, answer
chunks = list(model.stream(talk))
assert "".join(chunk.content for chunk in chunks) == answer.content
assert [found.content for found in model.batch([talk, talk])] == [answer.content] * 2
again = model.invoke([*talk, answer, ("human", "Another?")])  # an answer sent back as it came
assert again.usage_metadata["input_token_details"]["cache_read"] > 0
light = ChatOpenAI(max_tokens=200, **fields).with_structured_output(Light, method="json_schema").invoke("A light")
assert isinstance(light, Light)
reading = ChatOpenAI(max_tokens=5, extra_body={"documents": [{"text": "The ship is the Argo."}]}, **fields)
assert reading.invoke(talk).usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]

responses = ChatOpenAI(max_tokens=5, use_responses_api=True, use_previous_response_id=True, **fields)
first = responses.invoke(talk)
assert first.text == answer.content, (first, answer)
second = responses.invoke([*talk, first, ("human", "Another?")])
assert second.usage_metadata["input_token_details"]["cache_read"] > 0
assert "".join(chunk.text for chunk in responses.stream(talk)) == answer.content
