"""The JSON of requests and responses: OpenAI's shapes, `documents`, and the `kvgraph` object.

A field that isn't known is refused, and one that OpenAI knows but kvgraph doesn't support is refused unless it has its
neutral value: nothing is dropped silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ref = Annotated[int, Field(ge=0, lt=1 << 31)] | Name  # a document by index or by id
Edge = Annotated[tuple[Ref, Ref], Field(strict=False)]  # JSON has lists, and no tuples

NEUTRAL: dict[str, tuple[Any, ...]] = {  # OpenAI's fields that mean nothing here, with the values that ask for nothing
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": (),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
}
IGNORED = (  # who asks and for what, which changes no answer
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


class Strict(BaseModel):
    """Refuses unknown fields, values of another type (true is no number, "1" neither), NaN and infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextDocument(Strict):
    """A document to read. `id` names it in edges and in the usage."""

    id: Name | None = None
    title: str | None = None
    text: str


class StoredDocument(Strict):
    """A segment that was stored before (`PUT /v1/segments`)."""

    segment: Name


DocumentIn = TextDocument | StoredDocument


class GraphOptions(BaseModel):
    """How documents are composed. Fields besides these are fields of the method: `rounds`, `links`, `layout`, ...

    method: full, block, kvlink, graph-kv, ... or a preset; fields may also follow a colon ("graph-kv:rounds=2"). edges:
    pairs [source, reader] of documents by index or id, or a name: all, chain, top-k:3, last-k:3, layers:1-3, star:0.
    graph: the name of a stored graph (`POST /v1/graphs`); segments: those of its segments that the question is about, by
    id, in the order given. prefix: text before the documents, for completions. timeout: seconds, at most the server's.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    method: Name | None = None
    edges: Name | list[Edge] | None = None
    graph: Name | None = None
    segments: list[Name] | None = None
    prefix: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None


class StreamOptions(Strict):
    """include_usage: a last chunk with the usage."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _with_neutral(document: dict[str, Any]) -> None:
    """Add to a request's JSON schema what `Generation` takes besides its fields, null for those that may be missing."""
    fields = document["properties"]
    for name in set(fields) - set(document["required"]):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    fields.update({name: {"enum": [*values, None]} for name, values in NEUTRAL.items()})
    fields.update({name: {} for name in IGNORED})


class Generation(Strict):
    """What chat and plain completions share."""

    model_config = ConfigDict(json_schema_extra=_with_neutral)

    model: str
    documents: list[DocumentIn] = []
    kvgraph: GraphOptions = GraphOptions()
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Name | Annotated[list[Name], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what OpenAI's clients may send and asks for nothing here."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in IGNORED or (name in NEUTRAL and (value is None or value in NEUTRAL[name])):
                continue
            if name in NEUTRAL:
                raise ValueError(f"{name} isn't supported")
            if value is not None:
                kept[name] = value
        return kept


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message. Roles are those of the model's chat template."""

    role: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Generation):
    """`POST /v1/completions`. Several prompts give several choices."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class Details(BaseModel):
    """What this request cost, beyond what OpenAI's usage tells. Times are seconds since the request was queued.

    computed_tokens ran through the model before the first token of the answer; of them document_tokens_computed are the
    documents'. reused_tokens: by where they came from: memory, disk, or shared with a request that runs now. dropped:
    documents left out because they didn't fit (setting `overflow`).
    """

    method: str
    computed_tokens: int
    document_tokens_computed: int
    reused_tokens: dict[str, int]
    kv_bytes: int
    queued: float
    encoded: float
    ttft: float
    decode: float
    dropped: list[str] = []


class PromptDetails(BaseModel):
    """cached_tokens: prompt tokens whose KV was reused."""

    cached_tokens: int


class UsageOut(BaseModel):
    """Tokens of a request. prompt_tokens: all that the answer could attend to, every version of every document."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    kvgraph: Details


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A chosen token and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob] | None


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatResponse(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageOut


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class CompletionResponse(BaseModel):
    """A completion, or (streamed) a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageOut | None = None


class Delta(BaseModel):
    """What is new in a streamed message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageOut | None = None


class ModelCard(BaseModel):
    """The served model, and what a client can ask it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvgraph"
    max_model_len: int
    kvgraph: dict[str, Any]


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
