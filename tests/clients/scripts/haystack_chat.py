"""haystack-ai: OpenAIChatGenerator and OpenAIResponsesChatGenerator, at once and streamed."""

import os

from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

fields = {
    "model": os.environ["MODEL"],
    "api_base_url": os.environ["OPENAI_BASE_URL"],
    "api_key": Secret.from_token("none"),
}
talk = [ChatMessage.from_system("Be brief."), ChatMessage.from_user("Name a ship.")]
chat = OpenAIChatGenerator(generation_kwargs={"max_tokens": 5, "temperature": 0}, **fields)
(answer,) = chat.run(talk)["replies"]
assert answer.meta["usage"]["completion_tokens"] == 5, answer.meta
pieces: list[str] = []
(streamed,) = chat.run(talk, streaming_callback=lambda chunk: pieces.append(chunk.content))["replies"]
assert streamed.text == answer.text == "".join(pieces)
(again,) = chat.run([*talk, answer, ChatMessage.from_user("Another?")])["replies"]
assert again.meta["usage"]["prompt_tokens"] > answer.meta["usage"]["prompt_tokens"]
documents = {"extra_body": {"documents": [{"text": "The ship is the Argo."}]}}
(read,) = chat.run(talk, generation_kwargs=documents)["replies"]
assert read.meta["usage"]["prompt_tokens"] > answer.meta["usage"]["prompt_tokens"]

responses = OpenAIResponsesChatGenerator(generation_kwargs={"max_output_tokens": 5, "temperature": 0}, **fields)
(answered,) = responses.run(talk)["replies"]
assert answered.text == answer.text, (answered, answer)
