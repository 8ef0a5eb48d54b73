"""pydantic-ai: agents over chats and over responses, with text and with both kinds of structured output."""

import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Light(BaseModel):
    """A light."""

    colour: Literal["red", "green"]
    on: bool


provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key="none")
texts = []
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind(os.environ["MODEL"], provider=provider)
    agent = Agent(model, instructions="Be brief.", model_settings={"max_tokens": 5, "temperature": 0})
    first = agent.run_sync("Name a ship.")
    second = agent.run_sync("Another?", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.cache_read_tokens > 0, second.usage
    texts.append(first.output)
    for form in (NativeOutput(Light), Light):  # by JSON schema, and as a function that must be called
        light = Agent(model, output_type=form, model_settings={"max_tokens": 200}).run_sync("A light")
        assert isinstance(light.output, Light)
assert texts[0] == texts[1], texts
