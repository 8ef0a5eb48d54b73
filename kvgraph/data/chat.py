"""Chat messages and documents as the pieces of a context graph, cut out of the text that the model's template renders.

The joined pieces are always the template's text, so a plain prefill of them is what the model was tuned on. Pieces are
cut where nothing later can change them: turn k of a conversation is the same piece in turn k + 1, so its KV is found
again. Pure Python: of a tokenizer, only `chat_template`, `apply_chat_template`, ids and offsets are used.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph, Edge, Text

DOCUMENT = "{title}\n{text}\n\n"
Messages = Sequence[Mapping[str, Any]]
MARK = "\u2063kvgraph-{}\u2063"  # replaces a text while a template renders; invisible separators keep it unique


class ChatError(GraphError):
    """Messages can't be rendered: no chat template, one that refuses or drops them, no user message for documents."""


@dataclass(frozen=True)
class Document:
    """A document to read: its text, and its title if it has one. `tokens` replaces both by token ids.

    id: for people and records; the model doesn't read it.
    """

    text: str = ""
    title: str = ""
    id: str = ""
    tokens: tuple[int, ...] | None = None

    def filled(self, template: str) -> Text:
        """The segment: the template with {title} and {text} filled in. Lines with only a missing title are removed."""
        if self.tokens is not None:
            return self.tokens
        if not (self.text or self.title):
            return ""
        if not self.title:
            template = template.replace("{title}\n", "").replace("{title}", "")
        return template.format(title=self.title, text=self.text)


@dataclass(frozen=True)
class Prompt:
    """Text in the order of a plain prompt: pieces of the prefix, documents, and what the model answers."""

    prefix: tuple[str, ...]
    segments: tuple[Text, ...]
    query: str

    def graph(self, edges: Sequence[Edge] = (), names: Sequence[str] | None = None) -> ContextGraph:
        """The context graph of these pieces."""
        return ContextGraph(self.segments, self.query, list(self.prefix), edges, names)


def check_template(template: str) -> str:
    """The document template itself. Raises ChatError unless it says where the text goes."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:
        fields = []
    if "text" not in fields or set(fields) - {"text", "title"}:
        raise ChatError(
            f"the document template {template[:60]!r} must contain {{text}}, and no other field than {{title}}"
        )
    return template


def opening(tokenizer: Any) -> tuple[int, ...]:
    """What this tokenizer puts before a plain text: its BOS token, or nothing."""
    ids = list(tokenizer("").input_ids)
    return tuple(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else ()


def chat(
    tokenizer: Any,
    messages: Messages,
    documents: Sequence[Document] = (),
    *,
    template: str | None = None,
    answer: bool = True,
    proceed: bool = False,
    **variables: Any,
) -> Prompt:
    """Messages ({"role", "content"}), and the documents that the last user message is about, as a prompt.

    The prompt contains every message. A `developer` message becomes a `system` message if the template doesn't know the
    role, and a message that the template would leave out is an error.

    answer: end with the header of the answer.
    proceed: the last message is the beginning of the answer, which is left open.
    template: how to write a document, see `DOCUMENT`.
    variables: further variables of the chat template.

    Documents stand where the model's template has a place for them, in its form. If it has none, or if `template` is
    given, they are written with that template at the start of the last user message, so that earlier turns stay a
    prefix. Raises ChatError.
    """
    render = _Renderer(tokenizer, variables, answer, proceed)
    messages = render.known(messages)
    if not documents:
        whole = render.whole(messages)
        cuts = render.cuts(whole, messages[:-1] if proceed else messages)
        return Prompt(_pieces(whole, cuts), (), whole[cuts[-1] if cuts else 0 :])
    if template is None and (prompt := render.native(messages, documents)) is not None:
        return prompt
    last = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "user"), None)
    if last is None:
        raise ChatError("documents need a user message that asks about them; add one")
    mark = MARK.format(f"documents-{os.urandom(8).hex()}")
    marked = [
        *messages[:last],
        {**messages[last], "content": mark + str(messages[last]["content"])},
        *messages[last + 1 :],
    ]
    before, *after = render.whole(marked).split(mark)
    if len(after) != 1:
        raise ChatError("the chat template doesn't render the last user message exactly once; documents need that")
    cuts = [*render.cuts(before, messages[:last]), len(before)]
    filled = tuple(d.filled(check_template(DOCUMENT if template is None else template)) for d in documents)
    return Prompt(_pieces(before, cuts), filled, after[0])


def plain(
    tokenizer: Any, instruction: str, documents: Sequence[Document], question: str, template: str = DOCUMENT
) -> Prompt:
    """The prompt for a model without a chat template: instruction, documents, question, with BOS where it belongs."""
    bos = tokenizer.bos_token if opening(tokenizer) else ""
    return Prompt((bos + instruction,), tuple(d.filled(check_template(template)) for d in documents), question)


def first_special(tokenizer: Any, text: str) -> tuple[int, str] | None:
    """Where the first special token of a text begins, and the token; None where it has none."""
    specials = _specials(tokenizer, len(tokenizer))
    at, _, token = min(((at, -len(s), s) for s in specials if (at := text.find(s)) >= 0), default=(-1, 0, ""))
    return None if at < 0 else (at, token)


@lru_cache(maxsize=8)
def _specials(tokenizer: Any, size: int) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*added, *tokenizer.all_special_tokens)))


def end_of_turn(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an answer: the first special one after it. None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _end_of_turn(tokenizer, str(template)) if template else None


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, template: str) -> int | None:
    mark = MARK.format("answer")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        after = _Renderer(tokenizer, {}, False, False)(messages, answer=False).partition(mark)[2]
    except ChatError:
        return None
    found = first_special(tokenizer, after)
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found[1]))


class _Renderer:
    def __init__(self, tokenizer: Any, variables: Mapping[str, Any], answer: bool, proceed: bool):
        if not getattr(tokenizer, "chat_template", None):
            raise ChatError("this model has no chat template; send a plain prompt, or give a template")
        self.tokenizer, self.variables, self.answer, self.proceed = tokenizer, variables, answer, proceed

    def whole(self, messages: Messages, **more: Any) -> str:
        """The prompt of messages, up to where the model continues."""
        if self.proceed:
            return self(messages, answer=False, continue_final_message=True, **more)
        return self(messages, answer=self.answer, **more)

    def known(self, messages: Messages) -> Messages:
        """The messages, with roles that the template renders. Raises ChatError for one that it would leave out."""
        developers = {i for i, message in enumerate(messages) if message.get("role") == "developer"}
        try:
            lost = self._lost(messages)
        except ChatError:  # many templates raise an error for an unknown role
            if not developers:
                raise
            lost = sorted(developers)
        if developers.intersection(lost):
            messages = [{**m, "role": "system"} if i in developers else m for i, m in enumerate(messages)]
            lost = self._lost(messages)
        if lost:
            role = messages[lost[0]].get("role")
            raise ChatError(
                f"the model's chat template leaves message {lost[0]} out of the prompt (role {role!r}); "
                "use a role that the template renders"
            )
        return messages

    def _lost(self, messages: Messages) -> list[int]:
        """The indices of messages whose content or calls aren't rendered. The content itself may also occur elsewhere."""
        marks = [f"kvgraph{os.urandom(8).hex()}" if message.get("content") else "" for message in messages]
        marked = [{**m, "content": mark} if mark else m for m, mark in zip(messages, marks, strict=True)]
        called = [f"kvgraph{os.urandom(8).hex()}" if message.get("tool_calls") else "" for message in messages]
        marked = [_calling(m, mark) if mark else m for m, mark in zip(marked, called, strict=True)]
        text = self(marked, answer=self.answer)
        return [i for i, found in enumerate(zip(marks, called, strict=True)) if any(mark not in text for mark in found)]

    def __call__(self, messages: Messages, *, answer: bool, **more: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, **self.variables, **more
            )
        except Exception as error:  # a template is a program and can raise anything
            raise ChatError(f"the model's chat template refuses these messages: {error}") from None

    def cuts(self, whole: str, messages: Messages) -> list[int]:
        """Where the first 1, 2, ... messages (see `_ends`) end in `whole`.

        There the text of these messages alone and any text with further messages diverge: a template may end a
        conversation differently from a turn within one.
        """
        ends: list[int] = []
        text = _Whole(self.tokenizer, whole)
        closing = ""  # what the template was seen to end a conversation with
        for i in _ends(len(messages)):
            try:
                part = self(messages[:i], answer=False).removesuffix(closing)
            except ChatError:  # some templates refuse a system message alone
                continue
            end = text.shared(part)
            closing = closing or part[end:]
            if i == len(messages):
                end = min(end, _Whole(self.tokenizer, self._later(messages)).shared(part))
            if (ends[-1] if ends else 0) < end < len(whole):
                ends.append(end)
        return ends

    def _later(self, messages: Messages) -> str:
        """The messages as they may look in the next turn; without a next message if the template allows none."""
        role = "user" if messages[-1].get("role") == "assistant" else "assistant"
        try:
            return self([*messages, {"role": role, "content": MARK.format("later")}], answer=False)
        except ChatError:
            return self(messages, answer=False)

    def native(self, messages: Messages, documents: Sequence[Document]) -> Prompt | None:
        """The prompt as a template with a place for documents renders it; None if this template has none."""
        if "documents" not in str(self.tokenizer.chat_template) or any(d.tokens is not None for d in documents):
            return None
        key = os.urandom(8).hex()
        twice = [{"title": MARK.format("t" + key), "text": MARK.format("x" + key)}] * 2
        parts = self.whole(messages, documents=twice).split(twice[0]["text"])
        marks = [MARK.format(f"{i}-{key}") for i in range(len(documents))]
        listed = [{"title": d.title, "text": mark} for d, mark in zip(documents, marks, strict=True)]
        whole = self.whole(messages, documents=listed)
        if len(parts) != 3 or any(whole.count(mark) != 1 for mark in marks):
            return None
        footer = os.path.commonprefix(parts[1:])  # what follows every document, also the last
        between: list[str] = []
        for mark in marks:
            head, whole = whole.split(mark)
            between.append(head)
        header = parts[1][len(footer) :].replace(twice[0]["title"], documents[0].title)
        start = len(between[0]) - len(header) if between[0].endswith(header) else len(between[0])
        heads = [between[0][start:], *(text.removeprefix(footer) for text in between[1:])]
        segments = tuple(h + d.text + footer for h, d in zip(heads, documents, strict=True))
        before = between[0][:start]
        return Prompt(
            _pieces(before, [*self.cuts(before, messages), len(before)]), segments, whole.removeprefix(footer)
        )


class _Whole:
    """A text that others are compared with. It is tokenized once, and only if one of them isn't its beginning.

    Of the others, only a window is tokenized. It begins and ends at added tokens such as <|im_start|>, which tokenizers cut
    out of a text before anything else: what is between two of them is tokenized on its own.
    """

    def __init__(self, tokenizer: Any, text: str):
        self.tokenizer, self.text = tokenizer, text

    def shared(self, part: str) -> int:
        """The length of the common beginning of two texts, up to a token start of both if they differ in a token."""
        if self.text.startswith(part):
            return len(part)
        if not getattr(self.tokenizer, "is_fast", False):
            return 0  # it has no offsets
        same = _common(part, self.text)
        starts, marks = self._found
        added = _added(self.tokenizer, len(self.tokenizer))
        # A mark is surely one in both texts if no added token that begins there, or before, reaches where they differ.
        begin = next((at for at in reversed(marks) if at + added.longest <= same), 0)
        later = (m for m in added.pattern.finditer(part, begin) if m.start() >= same and m.group() in added.marks)
        end = next((m.end() for m in later), len(part))
        window = (begin + at for at, _, _ in _tokens(self.tokenizer, part[begin:end]))
        return max((at for at in window if at <= same and at in starts), default=0)

    @cached_property
    def _found(self) -> tuple[set[int], list[int]]:
        """Where the tokens of the text begin, and where those that are marks do."""
        marks = _added(self.tokenizer, len(self.tokenizer)).marks
        tokens = _tokens(self.tokenizer, self.text)
        return {at for at, _, _ in tokens}, [at for at, end, i in tokens if marks.get(self.text[at:end]) == i]


@dataclass(frozen=True)
class _Added:
    """The added tokens that are found in a text before it is normalised.

    pattern: finds them as the tokenizer does, the longest of those that begin first. marks: the ids of those that are
    found whatever is around them. longest: characters of the longest one.
    """

    pattern: re.Pattern[str]
    marks: Mapping[str, int]
    longest: int


@lru_cache(maxsize=8)
def _added(tokenizer: Any, size: int) -> _Added:
    found = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content and not token.normalized}
    texts = sorted((token.content for token in found.values()), key=len, reverse=True)
    marks = {token.content: i for i, token in found.items() if not token.single_word}
    if tokenizer.split_special_tokens:  # it may read any of them as text
        marks = {}
    return _Added(re.compile("|".join(map(re.escape, texts)) or r"(?!)"), marks, max(map(len, texts), default=0))


def _tokens(tokenizer: Any, text: str) -> list[tuple[int, int, int]]:
    """Begin, end and id of each token of a text."""
    text = text.encode("utf-8", "replace").decode()  # tokenizers can't read half a surrogate pair
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(begin, end, i) for (begin, end), i in zip(encoded["offset_mapping"], encoded["input_ids"], strict=True)]


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts. `os.path.commonprefix` compares single characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _ends(count: int) -> Iterator[int]:
    """After which of `count` messages to cut: each of the first 64, each 8th up to 512, each 64th up to 4,096, and so on.

    A cut costs a rendering of all messages before it, so one cut per message would take minutes for thousands of them.
    """
    end, step = 0, 1
    while end + step <= count:
        end += step
        yield end
        if end == 64 * step:
            step *= 8


def _calling(message: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A message whose last call is one of a function of this name."""
    *calls, last = message["tool_calls"]
    return {**message, "tool_calls": [*calls, {**last, "function": {**last["function"], "name": name}}]}


def _pieces(text: str, cuts: Sequence[int]) -> tuple[str, ...]:
    return tuple(text[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if a < b)
