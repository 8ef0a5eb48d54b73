"""Answers that keep to a grammar: a JSON schema, a regular expression or a Lark grammar, by the library `llguidance`.

A grammar says of every token whether it may come next. `Guides.begin` finds that for many answers at once, and a sampler then
chooses among these tokens as it does among all. Grammars are about bytes, so it makes no difference how a text is split
into tokens. Of the special tokens only an end token can come, where the grammar may end.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvgraph.errors import KVGraphError

if TYPE_CHECKING:
    from kvgraph.models import Model

KEPT = 64  # grammars: compiled, or why they can't be
SPACES = "( |\n[ ]{0,32})?"  # between the parts of JSON: models write it on one line or indented, and never without end
JSON = {"whitespace_pattern": SPACES, "whitespace_flexible": True, "lenient": False}
LONG = re.compile(r"\d{16}")  # a number that may have more digits than a float of 64 bits
LIMITS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}  # and where what they allow lies
LONGEST = 1 << 17  # characters of a grammar
SEARCHED = 4 * LONGEST  # characters that are compiled to find which part of a refused grammar is wrong
STACK = 1 << 28  # bytes: the compiler follows `$ref` in `$ref` by recursion, and would end the process
NAMED = (
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
)  # keywords of JSON Schema that hold schemas by name,
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")  # lists of schemas,
SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")  # and one
Path = tuple[str | int, ...]
T = TypeVar("T")
_STACK = threading.Lock()


class GrammarError(KVGraphError, ValueError):
    """A grammar can't be compiled, or this model can't follow one. path: where in a JSON schema."""

    def __init__(self, message: str, path: Path = ()):
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: a JSON value of a schema, a match of a regular expression, or a text of a Lark grammar.

    text: the schema as JSON, the expression (Rust's syntax, without look-around; the whole answer must match), or the
    grammar (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark") or not isinstance(self.text, str):
            raise GrammarError(f"a grammar is json_schema, regex or lark, and a text, not {self.kind!r}")

    @classmethod
    def json_schema(cls, schema: dict[str, Any]) -> Grammar:
        """The JSON values that are valid under a schema."""
        try:
            return cls("json_schema", json.dumps(schema, ensure_ascii=False))
        except (RecursionError, TypeError, ValueError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from None

    @classmethod
    def json_object(cls) -> Grammar:
        """All JSON objects."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, texts: Iterable[str]) -> Grammar:
        """One of these texts."""
        return cls("lark", "start: " + " | ".join(json.dumps(text) for text in texts))


class Search:
    """How much may still be compiled to name the part of a refused grammar that is wrong: a few times the longest one."""

    def __init__(self) -> None:
        self._left = SEARCHED

    def affords(self, grammar: Grammar) -> bool:
        """Whether a part may be compiled, which is counted. Even the shortest costs as much as some text."""
        fine = self._left > 0
        self._left -= len(grammar.text) + 256
        return fine


class Guide:
    """One answer's way through its grammar."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def take(self, token: int) -> bool:
        """Go on with a token that the last mask allowed; whether the answer can only end now. Raises GrammarError."""
        self.matcher.consume_token(token)
        if self.matcher.is_error():
            raise GrammarError(f"the grammar can't be followed any further: {_line(self.matcher.get_error())}")
        return bool(self.matcher.is_stopped())


class Guides:
    """The grammars of a model's answers, each compiled once. `guide` may be called by any thread."""

    def __init__(self, model: Model):
        self._model = model
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()  # in order of use
        self._lock = threading.Lock()

    def guide(self, grammar: Grammar) -> Guide:
        """The guide of a new answer. Raises GrammarError for a grammar that can't be compiled, or not for this model."""
        _ = self._tokenizer  # what is wrong with that is no fault of the grammar
        if len(grammar.text) > LONGEST:
            raise GrammarError(f"a grammar may have {LONGEST} characters, and this one has {len(grammar.text)}")
        with self._lock:
            found = self._compiled.pop(grammar, None)
        if found is None:
            found = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            if isinstance(found, GrammarError):
                raise GrammarError(str(found), found.path)
            return Guide(found.deep_copy())

    def begin(self, guides: Sequence[Guide]) -> Future[Tensor]:
        """Which tokens may come next [len(guides), V] bool, on the CPU; found beside whatever else is done.

        An answer that failed has none.
        """
        return self._worker.submit(self._masks, list(guides))

    def _masks(self, guides: list[Guide]) -> Tensor:
        size = self._model.vocab_size
        words = np.zeros((len(guides), (size + 31) // 32), dtype=np.int32)
        numbered = [(guide.matcher, i) for i, guide in enumerate(guides)]
        self._executor.unsafe_compute_mask_ptr(numbered, words.ctypes.data, words.shape[1] * 4, len(guides))
        for i, guide in enumerate(guides):
            if guide.matcher.is_error():
                words[i] = 0
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=size)
        return torch.from_numpy(bits.view(np.bool_))

    @cached_property
    def _worker(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "kvgraph-guide")

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError:
            raise GrammarError("guided answers need llguidance: pip install 'kvgraph[server]'") from None
        return llguidance

    @cached_property
    def _executor(self) -> Any:
        return self._library.LLExecutor(num_threads=torch.get_num_threads())

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self._model.tokenizer
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise GrammarError("guided answers need a model with a fast tokenizer")
        assert self._library is not None
        from llguidance.hf import from_tokenizer

        try:
            ends = list(self._model.eos_ids) or None
            return from_tokenizer(tokenizer, n_vocab=self._model.vocab_size, eos_token=ends)
        except ValueError as error:
            reason = _line(str(error))
            raise GrammarError(f"answers of this model can't be guided; its tokens are no bytes: {reason}") from None

    def _compile(self, grammar: Grammar) -> Any:
        """A matcher at the beginning of a grammar, or the GrammarError that says why there is none."""
        try:
            return on_large_stack(partial(self._matcher, grammar))
        except GrammarError as error:
            reason = str(error)
        path: Path = ()
        try:
            schema = json.loads(grammar.text) if grammar.kind == "json_schema" else None
        except ValueError:
            schema = None
        if isinstance(schema, dict):
            path, reason = on_large_stack(partial(self._innermost, schema, reason))
        return GrammarError(reason, path)

    def _matcher(self, grammar: Grammar) -> Any:
        make = self._library.LLMatcher
        try:
            if grammar.kind == "json_schema":
                source = make.grammar_from_json_schema(_exact(grammar.text), overrides=JSON)
            else:
                source = (make.grammar_from_regex if grammar.kind == "regex" else make.grammar_from_lark)(grammar.text)
        except ValueError as error:
            raise GrammarError(_line(str(error))) from None
        matcher = make(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(_line(matcher.get_error()))
        return matcher

    def _innermost(self, schema: Any, reason: str) -> tuple[Path, str]:
        """The path of the innermost part of a schema that can't be compiled by itself, and why.

        Every part takes the schema's definitions along, so the search ends at an outer part when it becomes long.
        """
        top = {name: schema[name] for name in ("$defs", "definitions", "$schema") if name in schema}
        path: Path = ()
        search = Search()
        while True:
            for step, part in _parts(schema):
                try:
                    grammar = Grammar.json_schema({**top, **part})
                    if not search.affords(grammar):
                        return path, reason
                    self._matcher(grammar)
                except GrammarError as error:
                    path, schema, reason = (*path, *step), part, str(error)
                    break
            else:
                return path, reason


def on_large_stack(work: Callable[[], T]) -> T:
    """The result of `work`, on a thread of its own that has room for the compiler's recursion."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    with _STACK:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="kvgraph-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return outcome.result()


def _parts(schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The schemas in a JSON schema that are objects, with their paths."""
    found: list[tuple[Path, Any]]
    for name, value in schema.items():
        if name in NAMED and isinstance(value, dict):
            found = [((name, key), part) for key, part in value.items()]
        elif name in LISTED and isinstance(value, list):
            found = [((name, i), part) for i, part in enumerate(value)]
        else:
            found = [((name,), value)] if name in SINGLE else []
        yield from ((path, part) for path, part in found if isinstance(part, dict))


def _exact(text: str) -> str:
    """A JSON schema whose numbers the library can hold: it takes all of them for floats of 64 bits.

    A limit becomes the next such number inside. Raises GrammarError for a value that isn't one.
    """
    if not LONG.search(text):
        return text
    try:
        schema = json.loads(text)
    except (RecursionError, ValueError):
        return text  # the library says what is wrong with it
    return json.dumps(_with_floats(schema), ensure_ascii=False)


def _with_floats(part: Any, key: str = "") -> Any:
    if isinstance(part, dict):
        return {name: _with_floats(value, name) for name, value in part.items()}
    if isinstance(part, list):
        return [_with_floats(value, key) for value in part]
    if not isinstance(part, int) or isinstance(part, bool) or abs(part) <= 1 << 53:
        return part
    near = float(part) if abs(part) < 1 << 1023 else math.inf if part > 0 else -math.inf
    if near == part:
        return part
    if key in LIMITS and math.isfinite(near):
        inside = LIMITS[key]
        return int(near if (near - part) * inside > 0 else math.nextafter(near, inside * math.inf))
    raise GrammarError(f"the number {str(part)[:40]} can't be told from those beside it; up to 2**53 it can")


def _line(text: str) -> str:
    """What the library says, as one line: without its pictures of a place and the state of its parser."""
    lines = [" ".join(line.split()) for line in text.split("<state>")[0].split("\n")]
    return "; ".join(line for line in lines if line.strip("^| "))[:300]
