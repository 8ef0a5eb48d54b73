"""The JSON of requests and responses: OpenAI's shapes, `documents`, and the `kvgraph` object.

There are three kinds of fields: those that kvgraph understands, those that ask for something it doesn't do, which are
refused, and those that change no answer. The latter are accepted; unknown ones are named in the usage (setting
`unknown_fields`). null counts as a field that wasn't sent, at every depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MOST_MESSAGES = 10_000  # of a chat
Name = Annotated[str, Field(min_length=1, max_length=200)]
Pattern = Annotated[str, Field(min_length=1)]  # also a text to choose; `LONGEST` of `kvgraph.engine.guide` is the most
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
BiasedId = Annotated[int, Field(ge=0, lt=1 << 31, strict=False)]  # JSON has strings as keys
Ref = Annotated[int, Field(ge=0, lt=1 << 31)] | Name  # a document by index or by id
Unless = Field(exclude_if=lambda value: value is None)  # in answers: left out rather than null
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Edge = Annotated[tuple[Ref, Ref], Field(strict=False)]  # JSON has lists, and no tuples

UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # fields that change an answer, with the values that ask for nothing
    # OpenAI's
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's and other servers'
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (-1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
FUNCTIONS: dict[str, tuple[Any, ...]] = {"functions": ([],), "function_call": ("none", "auto")}  # tools' older names
TOOLS: dict[str, tuple[Any, ...]] = {  # fields of chats alone
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
IGNORED = (  # who asks and for what, which changes no answer
    "metadata",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
OF_ANSWERS = (
    "annotations",
    "id",
    "parsed",
    "phase",
    "provider_specific_fields",
    "status",
    "type",
)  # in messages sent back


def without_nulls(data: Any) -> Any:
    """A JSON object without the fields that are null; anything else as it is."""
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Strict(BaseModel):
    """Refuses unknown fields, values of another type (true is no number, "1" neither), NaN and infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _nullable(document: dict[str, Any]) -> None:
    """Let a JSON schema say that fields which may be missing may be null."""
    fields = document["properties"]
    for name in set(fields) - set(document.get("required", ())):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}


class Sent(Strict):
    """As `Strict`, but null is nothing, and unknown fields are kept for `unknown` to tell of."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return without_nulls(data)

    def unknown(self, path: str = "") -> Iterator[str]:
        """Paths of the fields that aren't known and have a value that may ask for something."""
        yield from (f"{path}{name}" for name, value in (self.model_extra or {}).items() if value)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for i, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, Sent):
                    yield from item.unknown(f"{path}{name}.{i}.")
            if isinstance(value, Sent):
                yield from value.unknown(f"{path}{name}.")


def unsupported(name: str, hint: str = "") -> PydanticCustomError:
    """The error of a field that asks for something kvgraph doesn't do."""
    return PydanticCustomError("unsupported_parameter", "{param} isn't supported" + hint, {"param": name})


def taken(
    data: dict[str, Any], refused: dict[str, tuple[Any, ...]], ignored: tuple[str, ...] = (), hint: str = ""
) -> dict[str, Any]:
    """A JSON object without the fields that ask for nothing. Raises the error of one that asks for something."""
    for name, values in refused.items():
        if data.get(name) is not None and not any(same(data[name], value) for value in values):
            raise unsupported(name, hint)
    return {name: value for name, value in data.items() if name not in refused and name not in ignored}


def same(sent: Any, value: Any) -> bool:
    """Whether a JSON value is this one; 0 isn't false."""
    return sent == value and isinstance(sent, bool) == isinstance(value, bool)


class TextDocument(Sent):
    """A document to read. `id` names it in edges and in the usage."""

    id: Name | None = None
    title: str | None = None
    text: str


class StoredDocument(Strict):
    """A segment that was stored before (`PUT /v1/segments`)."""

    segment: Name


def _kind(document: Any) -> str:
    stored = "segment" in document if isinstance(document, dict) else isinstance(document, StoredDocument)
    return "StoredDocument" if stored else "TextDocument"


DocumentIn = Annotated[
    Annotated[TextDocument, Tag("TextDocument")] | Annotated[StoredDocument, Tag("StoredDocument")],
    Discriminator(_kind),
]


class GraphOptions(BaseModel):
    """How documents are composed. Fields besides these are fields of the method: `rounds`, `links`, `layout`, ...

    method: full, block, kvlink, graph-kv, ... or a preset; fields may also follow a colon ("graph-kv:rounds=2"). edges:
    pairs [source, reader] of documents by index or id, or a name: all, chain, top-k:3, last-k:3, layers:1-3, star:0.
    graph: the name of a stored graph (`POST /v1/graphs`); segments: those of its segments that the question is about, by
    id, in the order given; retrieve: how many of its segments to find for the question (a chat's last user message, or the
    prompt) instead. prefix: text before the documents, for completions. shadow: compare the answer's first tokens with
    `full`; the usage has the result. timeout: seconds, at most the server's.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=_nullable)

    method: Name | None = None
    edges: Name | list[Edge] | None = None
    graph: Name | None = None
    segments: list[Name] | None = None
    retrieve: Annotated[int, Field(ge=1, le=1000)] | None = None
    prefix: str | None = None
    shadow: bool = False
    timeout: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return without_nulls(data)


class StreamOptions(Sent):
    """include_usage: a last chunk has the usage. continuous_usage_stats: every chunk has the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


def _with_neutral(document: dict[str, Any]) -> None:
    """Add to a request's JSON schema what `Generation` takes besides its fields."""
    _nullable(document)
    fields = document["properties"]
    fields["logit_bias"]["anyOf"].append({"type": "array", "maxItems": 0})
    neutral = UNSUPPORTED | FUNCTIONS | ({} if "tools" in fields else TOOLS)
    fields.update({name: {"enum": [*values, None]} for name, values in neutral.items()})
    fields.update({name: {} for name in IGNORED})


class JSONSchema(Sent):
    """A schema that the answer is valid under, whatever `strict` says. The model isn't told of it."""

    name: Name
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool = False


class ResponseFormat(Sent):
    """What the answer must be: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "{param} is missing", {"param": "json_schema"})
        return self


class StructuredOutputs(Sent):
    """What the answer must be, in the words of vLLM's server; one of them."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Annotated[list[Pattern], Field(min_length=1, max_length=1000)] | None = None
    grammar: Pattern | None = None
    json_object: Literal[True] | None = None


class Sampling(Sent):
    """What all requests that generate share: the documents they read, how these are composed, how tokens are chosen."""

    model: str
    documents: list[DocumentIn] = []
    kvgraph: GraphOptions = GraphOptions()
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Name | Annotated[list[Name], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[BiasedId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1000)] = {}
    min_tokens: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1000)] = []
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    @property
    def effort(self) -> tuple[str, Effort | None]:
        """The field that says how much to think before the answer, and what it says."""
        return "reasoning_effort", None


class Generation(Sampling):
    """Fields shared by chat and plain completions.

    One of response_format, structured_outputs and the fields guided_* (as older servers of vLLM name them) may say what
    the answer must be.
    """

    model_config = ConfigDict(json_schema_extra=_with_neutral)

    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Annotated[list[Pattern], Field(min_length=1, max_length=1000)] | None = None
    guided_grammar: Pattern | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what clients may send and asks for nothing here."""
        if not isinstance(data, dict):
            return data
        data = taken(data, FUNCTIONS, hint="; send `tools` and `tool_choice`")
        if data.get("best_of") is not None and data["best_of"] != data.get("n", 1):
            raise unsupported("best_of", "; ask for `n` answers")
        data = {
            name: value for name, value in data.items() if name != "best_of" and (name, value) != ("logit_bias", [])
        }
        return taken(data, UNSUPPORTED, IGNORED)


class TextPart(Sent):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    cache_control: Any = None  # what is read again is found again in any case

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what parts of answers hold that are sent back."""
        return taken(data, {}, ("annotations", "logprobs", "parsed")) if isinstance(data, dict) else data


class FunctionCalled(Sent):
    """A function and its arguments: JSON as a text, or an object."""

    name: Name
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Sent):
    """A call that an earlier answer asked for."""

    id: str = ""
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionCalled

    def rendered(self) -> dict[str, Any]:
        """What the chat template gets, but for the spelling of the arguments."""
        given = self.function.arguments
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Message(Sent):
    """One message. Roles are those of the model's chat template.

    reasoning_content: the thoughts before an earlier answer, for templates that read them. tool_calls: those that an
    earlier answer asked for. tool_call_id: the call that a tool's message answers.
    """

    role: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what answers that are sent back hold, and asks for nothing."""
        if not isinstance(data, dict):
            return data
        data = taken(data, {"function_call": ()}, hint="; send `tool_calls`")
        return taken(data, {"audio": ()}, OF_ANSWERS)

    @model_validator(mode="after")
    def _called_by_answers(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            message, where = "{param} are those of the assistant's messages", {"param": "tool_calls"}
            raise PydanticCustomError("invalid_value", message, where)
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    def rendered(self) -> dict[str, Any]:
        """What the chat template gets, but for the spelling of calls."""
        calls = [call.rendered() for call in self.tool_calls]
        fields = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.text} | {name: value for name, value in fields.items() if value}


FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class FunctionIn(Sent):
    """A function that the model may call. parameters: a JSON schema of an object; without it, there are none.

    strict: arguments are valid under the schema also where the model chooses to call; those of forced calls always are.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolIn(Sent):
    """A tool. There is one kind: a function."""

    type: Literal["function"]
    function: FunctionIn


class FunctionChosen(Sent):
    """A function by name."""

    name: FunctionName


class ToolChosen(Sent):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionChosen


class AllowedTools(Sent):
    """Those of the tools that may be called, and whether one of them must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChosen], Field(min_length=1, max_length=1000)]


class ToolsAllowed(Sent):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_kind(choice: Any, *, named: str, allowed: str) -> str:
    """Which kind of `tool_choice` this is: "mode", or the name of the model of a named or of some allowed functions."""
    if isinstance(choice, str):
        return "mode"
    kind = choice.get("type") if isinstance(choice, dict) else getattr(choice, "type", None)
    return allowed if kind == "allowed_tools" else named


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[ToolChosen, Tag("ToolChosen")]
    | Annotated[ToolsAllowed, Tag("ToolsAllowed")],
    Discriminator(lambda choice: choice_kind(choice, named="ToolChosen", allowed="ToolsAllowed")),
]


class ChatOptions(Sent):
    """How the chat template is rendered.

    add_generation_prompt: end with the header of the answer. continue_final_message: the last message is the beginning
    of the answer, which continues it. chat_template_kwargs: further variables of the template, such as enable_thinking.
    reasoning_effort: one of them, which few templates have; the others ignore it.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: Effort | None = None

    @model_validator(mode="after")
    def _one_end(self) -> ChatOptions:
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            message, where = "{param} and add_generation_prompt can't both be true", {"param": "continue_final_message"}
            raise PydanticCustomError("invalid_value", message, where)
        return self


class ChatRequest(Generation, ChatOptions):
    """`POST /v1/chat/completions`.

    tool_choice: whether the model may call the tools (auto), mustn't (none, and it isn't told of them), or must call some
    (required) or one by name. parallel_tool_calls: whether there may be several calls.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: Annotated[list[ToolIn], Field(max_length=1000)] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_completions(cls, data: Any) -> Any:
        return taken(data, {"echo": (False,), "add_special_tokens": (False,)}) if isinstance(data, dict) else data

    @property
    def effort(self) -> tuple[str, Effort | None]:
        """See `Sampling.effort`."""
        return "reasoning_effort", self.reasoning_effort


class CompletionRequest(Generation):
    """`POST /v1/completions`. Several prompts give several choices.

    echo: the answer begins with the prompt, and its log-probabilities too; max_tokens may then be 0.
    """

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_chats(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("tool_choice") == "none":
            data = {name: value for name, value in data.items() if name not in ("tools", "tool_choice")}
        if data.get("reasoning_effort") == "none":
            data = {name: value for name, value in data.items() if name != "reasoning_effort"}
        return taken(data, {"add_special_tokens": (True,)} | TOOLS)

    @model_validator(mode="after")
    def _some_answer(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            message, where = "{param} must be at least 1, or 0 with echo", {"param": "max_tokens"}
            raise PydanticCustomError("greater_than_equal", message, where)
        return self


class Shadowed(BaseModel):
    """The first tokens of the answer, scored by the method and by `full`.

    kl: nats a token, KL(full || method). agreement: the share of tokens at which both have the same most likely one.
    """

    tokens: int
    kl: float
    agreement: float


class Details(BaseModel):
    """The cost of this request, beyond OpenAI's usage. Times are seconds since the request was queued.

    computed_tokens ran through the model before the first token of the answer; of them document_tokens_computed are the
    documents'. reused_tokens: by where they came from: memory, disk, or shared with a request that runs now. dropped:
    documents left out because they didn't fit (setting `overflow`). ignored: fields of the request that kvgraph doesn't
    know (setting `unknown_fields`). shadow: if the request asked for it, and unless `full` has no room for the prompt.
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
    ignored: Annotated[list[str], Field(exclude_if=lambda names: not names)] = []
    shadow: Annotated[Shadowed | None, Field(exclude_if=lambda told: told is None)] = None


class PromptDetails(BaseModel):
    """cached_tokens: prompt tokens whose KV was reused."""

    cached_tokens: int


class UsageOut(BaseModel):
    """Tokens of a request. prompt_tokens: all that the answer could attend to, every version of every document.

    Details are there when the answer is complete.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Annotated[PromptDetails | None, Unless] = None
    kvgraph: Annotated[Details | None, Unless] = None


class Citation(BaseModel):
    """A segment that was found for the question, and given to the model. via: the segment that led to it, which reads it;
    without it, the question did. score: compares the citations of one answer.
    """

    id: str
    title: str
    score: float
    via: Annotated[str | None, Unless] = None


Citations = Annotated[list[Citation] | None, Unless]
"""Of `kvgraph.retrieve`, best first. In a stream, they come with the chunk that ends the last choice."""


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
    """Log-probabilities of a completion's tokens. The first token of a prompt (`echo`) has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionOut(BaseModel):
    """A function to be called, with its arguments as JSON. In a stream, parts of both."""

    name: Annotated[str | None, Unless] = None
    arguments: str = ""


class ToolCallOut(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionOut


class AnswerMessage(BaseModel):
    """The assistant's message. reasoning_content: its thoughts, where the chat template separates them."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: Annotated[str | None, Unless] = None
    tool_calls: Annotated[list[ToolCallOut] | None, Unless] = None


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
    citations: Citations = None


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
    usage: Annotated[UsageOut | None, Unless] = None
    citations: Citations = None


class ToolCallDelta(BaseModel):
    """The new part of a call: first its id and name, then parts of its arguments."""

    index: int
    id: Annotated[str | None, Unless] = None
    type: Annotated[Literal["function"] | None, Unless] = None
    function: FunctionOut


class Delta(BaseModel):
    """The new part of a streamed message."""

    role: Annotated[Literal["assistant"] | None, Unless] = None
    content: Annotated[str | None, Unless] = None
    reasoning_content: Annotated[str | None, Unless] = None
    tool_calls: Annotated[list[ToolCallDelta] | None, Unless] = None


class ChatChunkChoice(BaseModel):
    """The new part of one answer."""

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
    usage: Annotated[UsageOut | None, Unless] = None
    citations: Citations = None


class ModelCard(BaseModel):
    """The served model, and what a client can ask for."""

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
