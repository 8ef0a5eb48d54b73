"""The JSON of `/v1/responses`, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

from kvgraph.server.schema import (
    IGNORED,
    MOST_MESSAGES,
    Details,
    Effort,
    FunctionName,
    Message,
    Name,
    Sampling,
    Sent,
    TextPart,
    TokenLogprob,
    Unless,
    choice_kind,
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
    "truncation": ("disabled",),
}
NAMED = {  # fields of chats, by what they are called here
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
SHOWN = ("metadata", "text", "tools")  # objects that the response shows again
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
    """How much to think, for chat templates that take it (see `ChatOptions`), and how to show it, which changes nothing."""

    effort: Effort | None = None
    summary: Any = None
    generate_summary: Any = None


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


class CallIn(Sent):
    """A function that an earlier answer called."""

    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    arguments: str = "{}"
    id: str | None = None
    status: str | None = None


class CallOutput(Sent):
    """What a function that was called gave back."""

    type: Literal["function_call_output"]
    call_id: Name
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        """The output as one text."""
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


def _kind(item: Any) -> str:
    """What an item of the input is; without a type it is a message."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[ReasoningIn, Tag("reasoning")]
    | Annotated[CallIn, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_parameter",
        custom_error_message="has a type that isn't supported; send items of type message, reasoning, function_call or "
        "function_call_output",
    ),
]


class FunctionTool(Sent):
    """A function that the model may call, as a tool of a chat."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def of_chat(self) -> dict[str, Any]:
        """The same as a tool of a chat."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class FunctionNamed(Sent):
    """A function that must be called, or may be."""

    type: Literal["function"]
    name: FunctionName

    def of_chat(self) -> dict[str, Any]:
        """The same as the `tool_choice` of a chat."""
        return {"type": "function", "function": {"name": self.name}}


class FunctionsAllowed(Sent):
    """Those of the functions that may be called, and whether one of them must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionNamed], Field(min_length=1, max_length=1000)]

    def of_chat(self) -> dict[str, Any]:
        """The same as the `tool_choice` of a chat."""
        allowed = {"mode": self.mode, "tools": [tool.of_chat() for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


FunctionChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[FunctionNamed, Tag("FunctionNamed")]
    | Annotated[FunctionsAllowed, Tag("FunctionsAllowed")],
    Discriminator(lambda choice: choice_kind(choice, named="FunctionNamed", allowed="FunctionsAllowed")),
]


def _with_neutral(document: dict[str, Any]) -> None:
    """Add to the request's JSON schema what `ResponseRequest` takes besides its fields."""
    fields = document["properties"]
    for name in set(fields) - set(document.get("required", ())):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    fields.update({name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()})
    fields.update({name: {"type": "null"} for name in NAMED})
    fields.update({name: {} for name in PASSING})


class ResponseRequest(Sampling):
    """`POST /v1/responses`: an answer to text, or to a list of messages.

    instructions: a system message of this request alone. previous_response_id: a kept response that the input goes on
    from; documents and instructions are those of this request. store: keep the response, so that it can be asked for and
    gone on from. include: "message.output_text.logprobs" shows log-probabilities, with `top_logprobs` likely tokens each.
    tools, tool_choice and parallel_tool_calls: as in a chat, of functions alone. Fields of `documents`, `kvgraph` and sampling are
    those of a chat.
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
    tools: Annotated[list[FunctionTool], Field(max_length=1000)] = Field(default_factory=list)
    tool_choice: FunctionChoice = "auto"
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
        for name in SHOWN:
            try:
                to_json(data.get(name))
            except PydanticSerializationError:
                said = "{param} can't be sent back: it has half of a surrogate pair, or is nested too deeply"
                raise PydanticCustomError("value_error", said, {"param": name}) from None
        return taken(data, UNSUPPORTED, PASSING)

    @property
    def effort(self) -> tuple[str, Effort | None]:
        """See `Sampling.effort`."""
        return "reasoning.effort", self.reasoning.effort

    @property
    def logprobs(self) -> bool:
        """Whether the answer's log-probabilities are wanted."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return _messages(self.input)


def _messages(items: Sequence[Message | ReasoningIn | CallIn | CallOutput]) -> list[dict[str, Any]]:
    """Items as messages: thoughts and calls are parts of the assistant's message that they stand beside."""
    messages: list[dict[str, Any]] = []
    thoughts = ""
    for item in items:
        if isinstance(item, ReasoningIn):
            thoughts += "".join(part.text for part in item.content)
        elif isinstance(item, CallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
        elif isinstance(item, CallIn):
            if thoughts or not messages or messages[-1]["role"] != "assistant":
                messages.append(_thought({"role": "assistant", "content": ""}, thoughts))
                thoughts = ""
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            said = item.rendered()
            messages.append(_thought(said, thoughts) if item.role == "assistant" else said)
            thoughts = ""
    return messages


def _thought(message: dict[str, Any], thoughts: str) -> dict[str, Any]:
    """An assistant's message with the thoughts before it."""
    return message | {"reasoning_content": thoughts} if thoughts else message


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


class ReasoningText(BaseModel):
    """Thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """The thoughts before an answer, where the chat template separates them. There is no summary of them."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningText]


class OutputCall(BaseModel):
    """A call of a function. arguments: JSON."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str = ""


OutputItem = OutputMessage | OutputReasoning | OutputCall


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
        """The output as messages of a chat: one of the assistant, with its thoughts and calls."""
        text = "".join(p.text for item in self.output if isinstance(item, OutputMessage) for p in item.content)
        thoughts = "".join(p.text for item in self.output if isinstance(item, OutputReasoning) for p in item.content)
        calls = [
            {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            for item in self.output
            if isinstance(item, OutputCall)
        ]
        message = _thought({"role": "assistant", "content": text}, thoughts)
        return [message | {"tool_calls": calls} if calls else message]


class ResponseEvent(BaseModel):
    """One event of a streamed response. Which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: Annotated[ResponseObject | None, Unless] = None
    output_index: Annotated[int | None, Unless] = None
    item_id: Annotated[str | None, Unless] = None
    item: Annotated[OutputItem | None, Unless] = None
    content_index: Annotated[int | None, Unless] = None
    part: Annotated[OutputText | ReasoningText | None, Unless] = None
    delta: Annotated[str | None, Unless] = None
    text: Annotated[str | None, Unless] = None
    name: Annotated[str | None, Unless] = None
    arguments: Annotated[str | None, Unless] = None
    logprobs: Annotated[list[TokenLogprob] | None, Unless] = None


class ResponseDeleted(BaseModel):
    """A response was forgotten."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
