"""The JSON of `/v1/responses`, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from kvgraph.server.schema import (
    IGNORED,
    MOST_MESSAGES,
    Details,
    Message,
    Name,
    Sampling,
    Sent,
    TokenLogprob,
    Unless,
    taken,
    unsupported,
)

UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # fields that change an answer, with the values that ask for nothing
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "image": ({},),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
NAMED = {  # fields of chats, by what they are called here
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
PASSING = tuple(name for name in IGNORED if name not in ("metadata", "store"))


class TextFormat(Sent):
    """What the answer must be: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool = False

    @model_validator(mode="after")
    def _with_schema(self) -> TextFormat:
        for field, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise PydanticCustomError("missing", "{param} is missing", {"param": field})
        return self

    def of_chat(self) -> dict[str, Any]:
        """The same as the `response_format` of a chat."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_, "strict": self.strict}}


class TextOptions(Sent):
    """How the text of the answer is written."""

    format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return taken(data, {"verbosity": ("medium",)}) if isinstance(data, dict) else data


class ReasoningOptions(Sent):
    """How to show thoughts; there is no way to ask for more or less of them."""

    summary: Any = None
    generate_summary: Any = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return taken(data, {"effort": ("none",)}) if isinstance(data, dict) else data


class EventOptions(Sent):
    """Nothing that changes an answer."""

    include_obfuscation: bool = False


class ReasoningPart(Sent):
    """A part of the thoughts before an answer."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningIn(Sent):
    """Thoughts before an earlier answer, for chat templates that read them. Their summary isn't read."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] = Field(default_factory=list)
    id: str | None = None
    summary: list[ReasoningPart] = Field(default_factory=list)
    encrypted_content: str | None = None
    status: str | None = None


def _kind(item: Any) -> str:
    """What an item of the input is; without a type it is a message."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[Message, Tag("message")] | Annotated[ReasoningIn, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_parameter",
        custom_error_message="has a type that isn't supported; send items of type message or reasoning",
    ),
]


def _with_neutral(document: dict[str, Any]) -> None:
    """Add to the request's JSON schema what `ResponseRequest` takes besides its fields."""
    fields = document["properties"]
    for name in set(fields) - set(document.get("required", ())):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    fields.update({name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()})
    fields.update({name: {"type": "null"} for name in NAMED})
    fields.update({name: {} for name in (*PASSING, "tools")})  # tools: none are used if tool_choice says so


class ResponseRequest(Sampling):
    """`POST /v1/responses`: an answer to text, or to a list of messages.

    instructions: a system message of this request alone. previous_response_id: a kept response that the input goes on
    from; documents and instructions are those of this request. store: keep the response, so that it can be asked for and
    gone on from. include: "message.output_text.logprobs" shows log-probabilities, with `top_logprobs` likely tokens each.
    Fields of `documents`, `kvgraph` and sampling are those of a chat.
    """

    model_config = ConfigDict(json_schema_extra=_with_neutral)

    input: str | Annotated[list[InputItem], Field(max_length=MOST_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool = True
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    text: TextOptions = TextOptions()
    include: list[str] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    metadata: Annotated[dict[str, Any], Field(default_factory=dict, max_length=16)]
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions = ReasoningOptions()
    stream_options: EventOptions | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what clients may send and asks for nothing here."""
        if not isinstance(data, dict):
            return data
        for name, here in NAMED.items():
            if data.get(name) is not None:
                raise unsupported(name, f" here; it is called {here}")
        if data.get("tool_choice") == "none":
            data = {name: value for name, value in data.items() if name not in ("tools", "tool_choice")}
        return taken(data, UNSUPPORTED, PASSING)

    @property
    def logprobs(self) -> bool:
        """Whether the answer's log-probabilities are wanted."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return list(_messages(self.input))


def _messages(items: list[Message | ReasoningIn]) -> Iterator[dict[str, Any]]:
    thoughts = ""
    for item in items:
        if isinstance(item, ReasoningIn):
            thoughts += "".join(part.text for part in item.content)
            continue
        message = item.rendered()
        if thoughts and item.role == "assistant":
            message["reasoning_content"] = thoughts
        thoughts = ""
        yield message


# -- answers ----------------------------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """An answer."""

    type: Literal["message"] = "message"
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


OutputItem = OutputMessage


class InputDetails(BaseModel):
    """cached_tokens: input tokens whose KV was reused. cache_write_tokens: those whose KV was computed to be kept."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Thoughts count as output, and aren't counted apart."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens of a response. input_tokens: all that the answer could attend to, every version of every document."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    kvgraph: Details


class ResponseFailure(BaseModel):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """A response. usage: once it has ended."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any] = {"effort": None, "summary": None}
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any = "auto"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The output as messages of a chat."""
        return [{"role": item.role, "content": "".join(part.text for part in item.content)} for item in self.output]


class ResponseEvent(BaseModel):
    """One event of a streamed response. Which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: Annotated[ResponseObject | None, Unless] = None
    output_index: Annotated[int | None, Unless] = None
    item_id: Annotated[str | None, Unless] = None
    item: Annotated[OutputItem | None, Unless] = None
    content_index: Annotated[int | None, Unless] = None
    part: Annotated[OutputText | None, Unless] = None
    delta: Annotated[str | None, Unless] = None
    text: Annotated[str | None, Unless] = None
    logprobs: Annotated[list[TokenLogprob] | None, Unless] = None


class ResponseDeleted(BaseModel):
    """A response was forgotten."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
