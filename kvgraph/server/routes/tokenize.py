"""The tokenizer over HTTP, as vLLM's server has it: what a text or a chat becomes, and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from kvgraph.server import errors, prompts
from kvgraph.server.lifecycle import Call, TheCall
from kvgraph.server.schema import MOST_MESSAGES, ChatOptions, Message, Sent, TokenId
from kvgraph.server.state import Server

router = APIRouter(responses=errors.DECLARED)


class TokenizeRequest(ChatOptions):
    """A text (`prompt`) or a chat (`messages`). add_special_tokens: of a text, for instance BOS; chats have their own."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt, or messages")
        return self


class Tokenized(BaseModel):
    """Token ids, how many they are, and how many the model can read. token_strs: as the vocabulary has them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Sent):
    """Token ids to be written out."""

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(BaseModel):
    """Their text, special tokens included."""

    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, call: TheCall) -> Tokenized:
    """The token ids of a text, or of a chat as its template renders it."""
    return await _worked(call, body.model, _tokenized, body)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, call: TheCall) -> Detokenized:
    """The text of token ids."""
    return await _worked(call, body.model, _detokenized, body)


@router.get("/tokenizer_info")
async def tokenizer_info(call: TheCall) -> dict[str, Any]:
    """What the tokenizer's configuration says: its class, special tokens, chat template."""
    return await _worked(call, None, _info)


async def _worked(call: Call, name: str | None, work: Any, *arguments: Any) -> Any:
    if name is not None:
        call.server.require_name(name)
    async with call.admitted():
        return await call.prepared(work, call.server, *arguments)


def _tokenized(server: Server, body: TokenizeRequest) -> Tokenized:
    if body.messages is not None:
        prompt = prompts.chat_prompt(server, body.messages, body)
        tokens = [token for piece in (*prompt.prefix, prompt.query) for token in server.engine.tokenize(piece)]
    elif body.add_special_tokens:
        tokens = prompts.with_bos(server, server.engine.tokenize(body.prompt or ""))
    else:
        tokens = server.engine.tokenize(body.prompt or "")
    written = server.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return Tokenized(count=len(tokens), max_model_len=server.engine.model.limit, tokens=tokens, token_strs=written)


def _detokenized(server: Server, body: DetokenizeRequest) -> Detokenized:
    prompts.check_ids(server, body.tokens, "tokens")
    return Detokenized(prompt=server.tokenizer.decode(body.tokens))


def _info(server: Server) -> dict[str, Any]:
    tokenizer = server.tokenizer
    said = {name: value for name, value in tokenizer.init_kwargs.items() if _is_json(value)}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return said | special | {"tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template}


def _is_json(value: Any) -> bool:
    """Whether it is a plain value; folders and files of this machine are told to nobody."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and "/" not in value)
