"""From a request's JSON to prepared engine requests: documents, edges, method, chat template, and limits.

Everything here may take long (tokenizing, planning, hashing) and runs on worker threads, never on the event loop.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvgraph import methods
from kvgraph.data.chat import DOCUMENT, ChatError, Document, Messages, Prompt, chat, opening
from kvgraph.edges import named_edges, names_segments
from kvgraph.engine.engine import Engine
from kvgraph.engine.guide import Grammar, GrammarError, Search
from kvgraph.engine.request import Request
from kvgraph.engine.sampling import SamplingParams
from kvgraph.errors import CapacityError, GraphError, PlanError
from kvgraph.graph import ContextGraph
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.server.errors import APIError, printable
from kvgraph.server.schema import (
    ChatOptions,
    ChatRequest,
    Citation,
    CompletionRequest,
    Generation,
    GraphOptions,
    Message,
    Sampling,
    StoredDocument,
    StructuredOutputs,
    ToolChosen,
    ToolsAllowed,
)
from kvgraph.server.tools.asked import Function, ToolUse, closed
from kvgraph.server.tools.asked import grammar as tools_grammar
from kvgraph.server.tools.dialect import Dialect, dialect_of, told_of, with_system
from kvgraph.server.tools.reading import PLAIN, Reading

if TYPE_CHECKING:
    from kvgraph.server.state import Server
    from kvgraph.server.tenants import Caller


log = logging.getLogger("kvgraph.server")


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt ready to be asked: its graph, method and plan, and one engine request a choice.

    dropped: the names of documents that were left out because they didn't fit. salt: of the tenant who asks. reading: how
    answers are to be read. citations: of what was found and is read.
    """

    graph: ContextGraph
    method: Method
    plan: Plan
    requests: tuple[Request, ...]
    dropped: tuple[str, ...] = ()
    salt: str = ""
    reading: Reading = PLAIN
    citations: tuple[Citation, ...] | None = None


@dataclass(frozen=True)
class _Talk:
    """A chat as the server takes it up. thinking: the prompt ends within the thoughts before an answer."""

    dialect: Dialect
    asked: ToolUse | None = None
    thinking: bool = False


@dataclass(frozen=True)
class _Context:
    """What a request is about: documents, the names that edges may call them by, edges as given, and the method.

    chosen: the documents that the question is about, by index; None: all. citations: of those that were found for it.
    """

    documents: list[Document]
    names: list[str]
    edges: Any
    method: Method
    chosen: tuple[int, ...] | None = None
    citations: tuple[Citation, ...] | None = None


def lay_out(server: Server, caller: Caller, body: ChatRequest | CompletionRequest) -> list[PreparedPrompt]:
    """The prompts of a request. Raises APIError or GraphError for what can't be laid out."""
    context = _documents(server, caller, body) if body.kvgraph.graph is None else _stored_graph(server, caller, body)
    if isinstance(body, ChatRequest):
        if body.kvgraph.prefix is not None:
            raise APIError(400, "kvgraph.prefix isn't for chats; send a system message", param="kvgraph.prefix")
        asked = asked_of(body)
        prompt = chat_prompt(server, body.messages, body, context.documents, asked)
        dialect = dialect_of(server.tokenizer)
        thinking = dialect.thoughts is not None and prompt.query.rstrip().endswith(dialect.thoughts.begin)
        talk = _Talk(dialect, asked, thinking)
        graph = _tokenized(server.engine, prompt.graph((), context.names))
        return [_fitting(server, caller, body, graph, context, talk)]
    graphs = [_plain_graph(server, body, prompt, context) for prompt in prompt_list(body.prompt)]
    return [_fitting(server, caller, body, graph, context, _Talk(Dialect())) for graph in graphs]


def method_of(server: Server, options: GraphOptions) -> Method:
    """The method a request asks for, or the server's default. Raises GraphError listing what there is."""
    method = server.method if options.method is None else methods.resolve(options.method)
    return with_fields(method, options.model_extra, "kvgraph.")


def with_fields(method: Method, given: dict[str, Any] | None, where: str = "") -> Method:
    """The method with fields of a request's object. Raises GraphError for one that it doesn't have."""
    known = methods.configuration(method)
    if unknown := sorted((given or {}).keys() - known):
        raise GraphError(
            f"{where}{unknown[0]}: neither an option nor a field of {method.name}, which has "
            f"{', '.join(sorted(known)) or 'no fields'}"
        )
    return methods.with_fields(method, given or {})


def sampling(server: Server, body: Generation, choice: int, kept_to: Grammar | None) -> SamplingParams:
    """The sampling parameters of a choice; choice i gets seed + i. OpenAI's default temperature is 1."""
    wanted = max_tokens(body)
    logprobs: int | None = None
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    elif isinstance(body, CompletionRequest):
        logprobs = body.logprobs
    stop = body.stop or ()
    return SamplingParams(
        max_tokens=server.settings.default_max_tokens if wanted is None else max(1, wanted),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        seed=None if body.seed is None else body.seed + choice,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        grammar=kept_to,
    )


def grammar(server: Server, body: Generation) -> Grammar | None:
    """What the answer must be, if the request says so; it can be compiled. Raises APIError 400."""
    wanted = list(_grammars(body))
    if not wanted:
        return None
    param, make = wanted[0]
    if len(wanted) > 1:
        both = f"{param} and {wanted[1][0]} both say what the answer must be; give one"
        raise APIError(400, both, param=wanted[1][0], code="invalid_value")
    try:
        made = make()
        server.engine.scheduler.guides.guide(made)
    except GrammarError as error:
        inside = "/".join(map(str, error.path))
        where = f"at {inside!r} of its schema: " if inside else ""
        raise APIError(400, f"{param} can't be used: {where}{error}", param=param, code="invalid_value") from None
    return made


def asked_of(body: ChatRequest) -> ToolUse | None:
    """What a chat asks of tools; None where it gives none, or they may not be called. Raises APIError 400."""
    choice = body.tool_choice
    functions = tuple(
        Function(f.name, f.description or "", f.parameters, f.strict) for f in (tool.function for tool in body.tools)
    )
    names = [function.name for function in functions]
    for i, name in enumerate(names):
        if name in names[:i]:
            param = f"tools.{i}.function.name"
            raise APIError(400, f"{param}: there are two functions {name!r}", param=param, code="invalid_value")
    if choice in ("none", "auto") and (choice == "none" or not functions):
        return None
    if not functions:
        raise APIError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    allowed, where, mode = names, "", choice if isinstance(choice, str) else "required"
    if isinstance(choice, ToolsAllowed):
        mode = choice.allowed_tools.mode
        allowed, where = [tool.function.name for tool in choice.allowed_tools.tools], ".allowed_tools.tools"
    elif isinstance(choice, ToolChosen):
        allowed, where = [choice.function.name], ".function.name"
    if unknown := [name for name in allowed if name not in names]:
        param = f"tool_choice{where}"
        raise APIError(400, f"{param}: {unknown[0]!r} isn't one of the tools", param=param, code="invalid_value")
    parallel = body.parallel_tool_calls and not isinstance(choice, ToolChosen)
    return ToolUse(functions, "auto" if mode == "auto" else "required", frozenset(allowed), parallel)


def _kept_to(server: Server, body: Generation, talk: _Talk) -> tuple[Grammar | None, Reading]:
    """The grammar of the answers, if they have one, and how they are to be read. Raises APIError 400."""
    asked, dialect = talk.asked, talk.dialect
    if asked is None:
        kept_to = grammar(server, body)
        return kept_to, Reading(thoughts=dialect.thoughts, thinking=talk.thinking and kept_to is None)
    text = grammar(server, body) if not asked.forced else None  # of which a forced call leaves nothing
    if text is not None and text.kind != "json_schema":
        both = "tools and a grammar both say what the answer must be; give one, or tool_choice none"
        raise APIError(400, both, param="tools", code="invalid_value")
    reading = asked.reading(dialect.forced, dialect.thoughts, talk.thinking, text is not None)
    if not asked.guided(text is not None):
        return None, reading
    before = dialect.thoughts.end if dialect.thoughts and talk.thinking else None
    made = partial(
        tools_grammar,
        form=dialect.forced,
        special=partial(special_token, server.tokenizer),
        before=before,
        answer=None if text is None else text.text,
    )
    try:
        server.engine.scheduler.guides.guide(whole := made(asked))
    except GrammarError as error:
        raise _unusable(server, asked, made, error) from None
    return whole, reading


def _unusable(server: Server, asked: ToolUse, made: Callable[[ToolUse], Grammar], error: GrammarError) -> APIError:
    """The error of the first function whose calls can't be kept to its schema, unless that takes long to find."""
    search = Search()
    for i, function in enumerate(asked.functions):
        if function.name not in asked.allowed:
            continue
        param = f"tools.{i}.function.parameters"
        try:
            for part in (Grammar.json_schema(function.schema()), made(asked.only(function.name))):
                if search.affords(part):
                    server.engine.scheduler.guides.guide(part)
        except GrammarError as found:
            inside = "/".join(map(str, found.path))
            where = f"at {inside!r} of its schema: " if inside else ""
            return APIError(400, f"{param} can't be used: {where}{found}", param=param, code="invalid_value")
    return APIError(400, f"tools can't be used: {error}", param="tools", code="invalid_value")


def special_token(tokenizer: Any, text: str) -> int | None:
    """The special token of a text; None where texts show it, or there is none."""
    token = tokenizer.convert_tokens_to_ids(text)
    added = None if token is None else tokenizer.added_tokens_decoder.get(token)
    return token if added is not None and added.special and added.content == text else None


def _shown(server: Server, reading: Reading) -> tuple[int, ...]:
    """Special tokens that an answer is read by."""
    marks = [] if reading.thoughts is None else [reading.thoughts.begin, reading.thoughts.end]
    marks += [] if reading.format is None else reading.format.marks
    return tuple(token for mark in marks if (token := special_token(server.tokenizer, mark)) is not None)


def _grammars(body: Generation) -> Iterator[tuple[str, Callable[[], Grammar]]]:
    """The fields of a request that say what the answer must be, and how each is made a grammar."""
    form = body.response_format
    if form is not None and form.type != "text":
        if form.json_schema is None or form.type == "json_object":
            yield "response_format", Grammar.json_object
        else:
            yield "response_format", partial(_closed, form.json_schema.schema_)
    given = body.structured_outputs or StructuredOutputs()
    fields: tuple[tuple[str, Any, Callable[[Any], Grammar]], ...] = (
        ("structured_outputs.json", given.json_, _schema),
        ("structured_outputs.regex", given.regex, partial(Grammar, "regex")),
        ("structured_outputs.choice", given.choice, Grammar.choice),
        ("structured_outputs.grammar", given.grammar, partial(Grammar, "lark")),
        ("structured_outputs.json_object", given.json_object, lambda _: Grammar.json_object()),
        ("guided_json", body.guided_json, _schema),
        ("guided_regex", body.guided_regex, partial(Grammar, "regex")),
        ("guided_choice", body.guided_choice, Grammar.choice),
        ("guided_grammar", body.guided_grammar, partial(Grammar, "lark")),
    )
    for name, value, make in fields:
        if value is not None:
            yield name, partial(make, value)


def _closed(schema: dict[str, Any]) -> Grammar:
    """The grammar of an answer's schema, with no property that it doesn't name: small models would add some without end."""
    try:
        return Grammar.json_schema(closed(schema))
    except RecursionError:
        return Grammar.json_schema(schema)  # which says so


def _schema(given: dict[str, Any] | str) -> Grammar:
    """The grammar of a schema that is sent as JSON or as text."""
    return Grammar("json_schema", given) if isinstance(given, str) else Grammar.json_schema(given)


def _takes_effort(server: Server) -> bool:
    """Whether the chat template has a place for how much to think."""
    return "reasoning_effort" in str(server.tokenizer.chat_template)


def ignored(server: Server, body: Sampling) -> list[str]:
    """The fields of a request that kvgraph, or its chat template, doesn't know, by path; some of them if there are many.

    Raises APIError for the first of them if the setting `unknown_fields` says so.
    """
    names = [printable(name, most=100) for name in islice(body.unknown(), 20)]
    field, effort = body.effort
    if effort not in (None, "none") and not _takes_effort(server):
        names.append(field)
    if names and server.settings.unknown_fields == "refuse":
        raise APIError(400, f"{names[0]} is not a known field", param=names[0], code="unknown_parameter")
    if names:
        log.info("ignored fields of a request", extra={"fields": {"ignored": names}})
    return names


def max_tokens(body: Generation) -> int | None:
    """The maximum number of tokens of the answer, if the request gives one."""
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        return body.max_completion_tokens
    return body.max_tokens


def _documents(server: Server, caller: Caller, body: Generation) -> _Context:
    """The documents that a request brings or names, the edges it gives, and the method it asks for."""
    for param in ("segments", "retrieve"):
        if getattr(body.kvgraph, param) is not None:
            raise APIError(
                400, f"kvgraph.{param} is for those of a graph; name it in kvgraph.graph", param=f"kvgraph.{param}"
            )
    if len(body.documents) > server.settings.max_documents:
        raise APIError(
            400,
            f"{len(body.documents)} documents, but at most {server.settings.max_documents} are taken",
            param="documents",
        )
    edges = body.kvgraph.edges
    found, names = [], []
    for i, given in enumerate(body.documents):
        if isinstance(given, StoredDocument):
            found.append(server.library.document(caller.tenant, given.segment))
            names.append(given.segment)
        else:
            found.append(Document(given.text, given.title or "", given.id or ""))
            names.append(given.id or f"doc {i}")
    if edges is not None:
        check_edges(server, len(named_edges(edges, names) if isinstance(edges, str) else edges))
    return _Context(found, names, edges, method_of(server, body.kvgraph))


def check_edges(server: Server, edges: int) -> None:
    """Raise APIError 400 for more edges than a request may have: every reader of many sources is encoded anew."""
    if edges > server.settings.max_edges:
        most = server.settings.max_edges
        raise APIError(400, f"{edges} edges, but at most {most} are taken", param="kvgraph.edges")


def _stored_graph(server: Server, caller: Caller, body: Generation) -> _Context:
    """The segments of a stored graph that a request names, what they were encoded from, and the graph's own method."""
    options = body.kvgraph
    given: dict[str, Any] = {
        "documents": body.documents,
        "kvgraph.method": options.method,
        "kvgraph.edges": options.edges,
    }
    given |= {f"kvgraph.{name}": True for name in options.model_extra or ()}
    for param, value in given.items():
        if value:
            raise APIError(
                400, f"a stored graph has its own documents, edges and method; leave out {param}", param=param
            )
    chosen = options.segments
    if chosen is not None and len(chosen) > server.settings.max_documents:
        raise APIError(
            400,
            f"{len(chosen)} segments, but at most {server.settings.max_documents} are taken",
            param="kvgraph.segments",
        )
    graph = server.library.graph(caller.tenant, options.graph or "", "kvgraph.graph")
    citations = None
    if options.retrieve is not None:
        if chosen is not None:
            raise APIError(400, "give kvgraph.segments or kvgraph.retrieve, not both", param="kvgraph.retrieve")
        if options.retrieve > server.settings.max_documents:
            most = server.settings.max_documents
            raise APIError(400, f"at most {most} segments are taken", param="kvgraph.retrieve")
        hits = server.indexes.search(graph, question(body), options.retrieve)
        citations = tuple(Citation(**hit._asdict() | {"via": hit.via or None}) for hit in hits)
        chosen = [hit.id for hit in hits]
    part = server.library.part(graph, chosen)
    documents = [Document(id=segment.id, tokens=segment.tokens) for segment in part.segments]
    return _Context(documents, [d.id for d in documents], part.edges, graph.method, part.chosen, citations)


def question(body: Generation) -> str:
    """What to find segments for: the last user message of a chat, or the one prompt. Raises APIError 400."""
    if isinstance(body, ChatRequest):
        asked = next((message.text for message in reversed(body.messages) if message.role == "user"), "")
    else:
        assert isinstance(body, CompletionRequest)
        prompt = prompt_list(body.prompt)
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise APIError(400, "kvgraph.retrieve needs one prompt, as text", param="kvgraph.retrieve")
        asked = prompt[0]
    if not asked.strip():
        raise APIError(400, "kvgraph.retrieve needs a question: a user message with text", param="kvgraph.retrieve")
    return asked


def chat_prompt(
    server: Server,
    messages: Sequence[Message],
    options: ChatOptions,
    documents: Sequence[Document] = (),
    asked: ToolUse | None = None,
) -> Prompt:
    """A chat over documents as its template renders it. Raises APIError for what can't be rendered."""
    variables = dict(server.settings.chat_template_kwargs)
    if options.reasoning_effort is not None and _takes_effort(server):
        variables["reasoning_effort"] = options.reasoning_effort
    variables |= options.chat_template_kwargs
    # Names of other arguments; `chat_template` among them would be a program of the client's.
    other = {"messages", *inspect.signature(server.tokenizer.apply_chat_template).parameters}
    if taken := sorted(other.intersection(variables)):
        param = f"chat_template_kwargs.{taken[0]}"
        raise APIError(
            400, f"{param} can't be set: it is not a variable of the template", param=param, code="invalid_value"
        )
    if options.continue_final_message and messages[-1].role != "assistant":
        param = "continue_final_message"
        raise APIError(400, "only a final message of the assistant can be continued", param=param)
    rendered, tools = _with_tools(server, [message.rendered() for message in messages], asked)
    try:
        return chat(
            server.tokenizer,
            rendered,
            documents,
            template=server.settings.document_template,
            answer=options.add_generation_prompt,
            proceed=options.continue_final_message,
            **variables,
            **tools,
        )
    except ChatError as error:
        raise APIError(400, str(error), param="messages", code="invalid_value") from None


def _with_tools(server: Server, messages: Messages, asked: ToolUse | None) -> tuple[Messages, dict[str, Any]]:
    """Messages, and the tools, as the template takes them. Raises APIError 400 where it has no place for a free choice."""
    if asked is None and not any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
        return messages, {}
    dialect = dialect_of(server.tokenizer)
    taken = dialect.messages(messages)
    if asked is None:
        return taken, {}
    if not asked.forced and not (dialect.tools and dialect.format):
        why = "has no place for tools" if not dialect.tools else "writes calls in a form that can't be read"
        raise APIError(
            400,
            f"the model's chat template {why}, so the model can't choose one; ask for a call by tool_choice (required, or "
            "a function), or serve the model with a chat_template that has",
            param="tools",
            code="unsupported_parameter",
        )
    if dialect.tools:
        return taken, {"tools": asked.told()}
    return with_system(taken, told_of([function.told() for function in asked.callable])), {}


def _plain_graph(server: Server, body: CompletionRequest, prompt: str | list[int], context: _Context) -> ContextGraph:
    engine = server.engine
    query = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    check_ids(server, query, "prompt")
    prefix = body.kvgraph.prefix
    if not context.documents and prefix is None:
        query = with_bos(server, query) if isinstance(prompt, str) else query
        if not query:
            raise APIError(400, "prompt is empty", param="prompt", code="invalid_value")
        return ContextGraph([], query)
    if body.echo:
        raise APIError(400, "echo needs a plain prompt, without documents and prefix", param="echo")
    template = server.settings.document_template or DOCUMENT
    segments = [d.filled(template) for d in context.documents]
    start = with_bos(server, engine.tokenize(prefix or ""))
    return _tokenized(engine, ContextGraph(segments, query, start, names=context.names))


def with_bos(server: Server, tokens: list[int]) -> list[int]:
    """The tokens after what the tokenizer puts before a text, unless they begin with it."""
    bos = opening(server.tokenizer)
    return tokens if tuple(tokens[: len(bos)]) == bos else [*bos, *tokens]


def check_ids(server: Server, tokens: Sequence[int], param: str) -> None:
    """Raise APIError 400 for a token id that the model doesn't have."""
    size = server.engine.model.vocab_size
    if tokens and max(tokens) >= size:
        raise APIError(
            400,
            f"{param} holds token id {max(tokens)}, but the vocabulary ends at {size - 1}",
            param=param,
            code="invalid_value",
        )


def prompt_list(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request: `prompt` is one, as text or token ids, or a list of such."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def _tokenized(engine: Engine, graph: ContextGraph) -> ContextGraph:
    return graph if graph.is_tokenized else graph.tokenized(engine.tokenize)


def _fitting(
    server: Server, caller: Caller, body: Generation, graph: ContextGraph, context: _Context, talk: _Talk
) -> PreparedPrompt:
    """The prompt over all documents, or, under the policy "drop", over as many of the first as fit."""
    kept_to, reading = _kept_to(server, body, talk)
    shown = _shown(server, reading)
    whole = _with_edges(graph, context, len(graph.segments if context.chosen is None else context.chosen))
    total = len(whole.read)

    def laid(kept: int) -> PreparedPrompt:
        fitted = whole if kept == total else _with_edges(graph, context, kept, whole)
        if context.method.needs_probe:  # a prompt that leaves no room for its answer isn't worth one
            _check_room(server, body, server.engine.plan(fitted, context.method, probe=False))
        plan = server.engine.plan(fitted, context.method)
        _check_room(server, body, plan)
        proceed = isinstance(body, CompletionRequest)  # its text follows the prompt's without a break
        echo = isinstance(body, CompletionRequest) and body.echo
        made = (
            server.engine.prepare(
                plan,
                sampling(server, body, i, kept_to),
                salt=caller.salt,
                proceed=proceed,
                echo=echo,
                shown=shown,
            )
            for i in range(body.n)
        )
        dropped = tuple(whole.names[i] for i in whole.read[kept:])
        cited = None if context.citations is None else tuple(c for c in context.citations if c.id not in dropped)
        return PreparedPrompt(fitted, context.method, plan, tuple(made), dropped, caller.salt, reading, cited)

    best, low, high, middle = None, 0, total, total
    while low <= high:  # fewer documents need less room, so the most that fit are found by halving
        try:
            best, low = laid(middle), middle + 1
        except (PlanError, CapacityError) as error:
            if server.settings.overflow == "refuse" or not middle:
                raise APIError(400, str(error), code="context_length_exceeded") from None
            high = middle - 1
        middle = (low + high) // 2
    assert best is not None
    return best


def _with_edges(graph: ContextGraph, context: _Context, kept: int, whole: ContextGraph | None = None) -> ContextGraph:
    """The graph, with its edges, whose query reads the first `kept` documents.

    Others are left out, and given pairs with them; of a stored graph they stay, as sources that are no longer chosen.
    """
    edges, names = context.edges, graph.names[:kept]
    if context.chosen is not None:
        return ContextGraph(graph.segments, graph.query, list(graph.prefix), edges, graph.names, context.chosen[:kept])
    pairs: Any = ()
    if isinstance(edges, str) and (whole is None or not names_segments(edges)):
        pairs = named_edges(edges, names)
    elif whole is not None:
        pairs = [(s, r) for s, r in whole.edges if s < kept and r < kept]
    elif edges:
        pairs = edges
    return ContextGraph(graph.segments[:kept], graph.query, list(graph.prefix), pairs, names)


def _check_room(server: Server, body: Generation, plan: Plan) -> None:
    """Raise PlanError unless the prompt and the answer, where its length is given, fit the model's positions."""
    last, limit, wanted = plan.prompt.positions[-1], server.engine.model.limit, max_tokens(body) or 1
    if wanted > limit - last:
        raise PlanError(
            f"the prompt ends at position {last} and the answer may have {wanted} tokens, but the model's limit is {limit}; "
            "send less, or ask for fewer tokens"
        )
