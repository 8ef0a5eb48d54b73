"""What runs in steps: requests, the spans encoded for them, and the token sequences of both."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvgraph.attention.rows import LINKED, MANY, SHORT, RowKV, View
from kvgraph.engine.detokenize import TextStream
from kvgraph.engine.guide import Guide
from kvgraph.engine.result import Result, Usage
from kvgraph.engine.sampling import Sampled, Sampler, SamplingParams
from kvgraph.plan import Group, Place, Plan, Span

MOST_SLICES = 4  # of one record, each attended to on its own; with more, one mask over the whole record is cheaper
UNCACHED = "uncached-"  # pool keys of spans that a plan computes each time; the rest of the key is unique


class Seen(NamedTuple):
    """A place by its record's key: how a row sees it, in the row's frame. The fields are those of a View."""

    key: str
    at: int
    lo: int
    hi: int
    group: int = 0
    temperature: float = 1.0
    scale: float = 1.0
    gaps: tuple[tuple[int, int], ...] = ()


class Sequence:
    """Tokens on their way through the model, in one frame: a span being encoded, or a prompt span and its answer.

    room: for tokens to come. keys: of the spans of the plan. linked: whether it is the next link of a chain and may copy
    what it sees.
    """

    def __init__(self, span: Span, keys: list[str], room: int = 0, *, linked: bool = False):
        self.span = span
        self.tokens = list(span.tokens)
        self.capacity = len(span) + room  # tokens its KV has room for
        self._positions = np.empty(self.capacity, dtype=np.int64)
        self._positions[: len(span)] = np.asarray(span.positions, dtype=np.int64) - span.start
        self.kv: RowKV | None = None  # made when its first row runs
        self.views: SequenceOf[View] | None = None  # made when its first row runs that isn't joined to another
        self.copied = 0  # bytes of spans that were gathered for it
        self.longest = LINKED if linked else SHORT  # of the spans that it gathers, on average
        self._keys = keys

    @property
    def positions(self) -> np.ndarray:
        """Of its tokens [len(tokens)] int64, in its own frame."""
        return self._positions[: len(self.tokens)]

    def append(self, token: int) -> None:
        """A token of the answer, after all others. There must be room."""
        n = len(self.tokens)
        self._positions[n] = self._positions[n - 1] + 1
        self.tokens.append(token)

    @cached_property
    def places(self) -> list[Seen]:
        """What it sees. A chain's links see all before them and mostly never need it: it is made when it is asked for."""
        start, groups = self.span.start, (Group(), *self.span.groups)
        found = [
            Seen(self._keys[p.span], p.at - start, p.lo, p.hi or 0, p.group, *groups[p.group]) for p in self.span.sees
        ]
        return found if len({seen.key for seen in found}) == len(found) else _joined(found)

    @cached_property
    def to_gather(self) -> int:
        """Tokens of the short spans that it will copy side by side, see `kvgraph.attention.rows.gathered`; 0: it won't."""
        sees = self.span.sees
        total = sum([(p.hi or 0) - p.lo for p in sees])
        if len(sees) < MANY or total > self.longest * len(sees) or self.span.groups:
            return 0
        apart = all([a.at + (a.hi or 0) <= b.at + b.lo for a, b in pairwise(sees)])
        return total if apart and len({p.span for p in sees}) == len(sees) else 0

    @property
    def parts(self) -> int:
        """About how many things a token of it attends to, besides its row."""
        return 1 if self.to_gather else len(self.span.sees)

    @property
    def done(self) -> int:
        return 0 if self.kv is None else self.kv.length

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


def continues(spans: SequenceOf[Span], index: int, before: int) -> bool:
    """Whether span `index` is the next link of a chain after span `before`: it sees what that sees, then all of that."""
    reader, source = spans[index], spans[before]
    return (
        len(reader.sees) == len(source.sees) + 1
        and reader.sees[-1] == Place(before, source.start, 0, len(source))
        and reader.sees[:-1] == source.sees
        and reader.start > source.positions[-1]
        and not reader.groups
    )


def link_of(plan: Plan, keys: SequenceOf[str], index: int) -> str:
    """The key of the span whose chain span `index` continues, or ""."""
    sees = plan.spans[index].sees
    return keys[sees[-1].span] if sees and continues(plan.spans, index, sees[-1].span) else ""


@dataclass(eq=False)
class Encoding:
    """A missing span being encoded once for all requests that wait for it."""

    key: str
    sequence: Sequence
    persistent: bool  # whether it goes to the store as well as the pool
    order: tuple[int, int] = (0, 0)  # of the request that needed it first, and of the span in its plan
    link: str = ""  # the key of the span whose chain this continues, see `continues`
    salt: str = ""  # of the tenant whose span it is
    waiters: set[Request] = field(default_factory=set)


@dataclass(eq=False)
class Loading:
    """A record being read from the store, once for all requests that wait for it."""

    key: str
    nbytes: int
    deadline: float  # on the clock of time.monotonic; then it is computed
    ahead: bool = False  # begun before anybody was admitted who needs it, and nobody has needed it since
    waiters: dict[Request, int] = field(default_factory=dict)  # -> the span's index in the request's plan


@dataclass(eq=False)
class Request:
    """One plan to be answered (or only encoded), from submission to its result."""

    plan: Plan
    keys: list[str]
    params: SamplingParams
    ends: frozenset[int]  # the tokens that end the answer
    sampler: Sampler
    stream: TextStream
    sequence: Sequence  # the prompt span, and the answer as it grows
    encode_only: bool  # finish as soon as everything its prompt span reads is encoded
    answer: tuple[int, ...]  # scored instead of decoding; all but its last token end the prompt span
    keep_logits: bool
    keep_answer: bool  # the distribution at every token of `answer`
    echo: bool  # decode on after the answer, which is all of the prompt span but its first token
    submitted: float
    usage: Usage
    guide: Guide | None = None  # if the answer has a grammar
    number: int = 0  # of its submission
    link: str = ""  # see Encoding
    salt: str = ""  # of the tenant it belongs to
    missing: set[str] = field(default_factory=set)  # encodings and records it waits for
    loads: set[str] = field(default_factory=set)  # of them, records that are being read
    absent: list[int] = field(
        default_factory=list
    )  # spans that weren't in the store; encoded once nothing is being read
    resolved: set[str] = field(default_factory=set)  # keys that are at hand, being read or being encoded
    looked_ahead: bool = False  # whether its records were asked for while it waits for memory
    held: set[str] = field(default_factory=set)
    token_ids: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    scored: list[Sampled] = field(default_factory=list)  # of the answer given, if log-probabilities are wanted
    distributions: list[Tensor] = field(default_factory=list)  # at the answer's tokens, if they are kept
    greedy: bool = True  # whether every scored token was the most likely
    first_logits: Tensor | None = None
    first_token_at: float = 0.0
    fresh: list[tuple[str, int]] = field(default_factory=list)  # (text, token) not yet handed to a stream
    result: Result | None = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether there is a result or an error."""
        return self.result is not None or self.error is not None


def _joined(places: list[Seen]) -> list[Seen]:
    """The places, with many slices of one record merged into one whose gaps are hidden."""
    slices: dict[Seen, list[tuple[int, int]]] = {}
    for seen in places:
        slices.setdefault(seen._replace(lo=0, hi=0), []).append((seen.lo, seen.hi))
    joined: list[Seen] = []
    for seen, found in slices.items():
        found.sort()
        gaps = tuple((hi, lo) for (_, hi), (lo, _) in pairwise(found))
        if len(found) > MOST_SLICES and all(lo <= hi for lo, hi in gaps):  # overlapping slices count twice
            joined.append(seen._replace(lo=found[0][0], hi=found[-1][1], gaps=gaps))
        else:
            joined += [seen._replace(lo=lo, hi=hi) for lo, hi in found]
    return joined
