"""llama-index-llms-openai-like: chat, completion, streams."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

fields = {"model": os.environ["MODEL"], "api_base": os.environ["OPENAI_BASE_URL"], "api_key": "none", "temperature": 0}
talk = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Name a ship.")]
chat = OpenAILike(is_chat_model=True, max_tokens=5, context_window=1000, max_retries=0, **fields)
answer = chat.chat(talk)
assert answer.raw.usage.completion_tokens == 5
assert "".join(chunk.delta for chunk in chat.stream_chat(talk)) == answer.message.content
plain = OpenAILike(is_chat_model=False, max_tokens=5, context_window=1000, max_retries=0, **fields)
completion = plain.complete("A ship")
assert completion.text and "".join(chunk.delta for chunk in plain.stream_complete("A ship")) == completion.text
body = {"extra_body": {"documents": [{"text": "The ship is the Argo."}]}}
reading = OpenAILike(is_chat_model=True, max_tokens=5, context_window=1000, additional_kwargs=body, **fields)
assert reading.chat(talk).raw.usage.prompt_tokens > answer.raw.usage.prompt_tokens
