"""What runs in steps: requests, the spans encoded for them, and the token sequences of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from kvgraph.attention.rows import RowKV, View
from kvgraph.engine.detokenize import TextStream
from kvgraph.engine.result import Result, Usage
from kvgraph.engine.sampling import Sampled, Sampler, SamplingParams
from kvgraph.plan import Group, Plan, Span

MOST_SLICES = 4  # of one record, each attended to on its own; with more, one mask over the whole record is cheaper
UNCACHED = "uncached-"  # pool keys of spans that a plan computes each time; the rest of the key is unique
Seen = tuple[str, tuple[Any, ...]]  # (a record's key, how a View sees it, in the reader's frame)


@dataclass(eq=False)
class Sequence:
    """Tokens being run through the model, in one frame: a span being encoded, or a prompt span and its answer."""

    tokens: list[int]
    positions: np.ndarray  # [len(tokens)], the frame's own
    places: list[Seen]
    capacity: int  # tokens that its KV has room for
    kv: RowKV | None = None  # made when its first row runs
    views: list[View] = field(default_factory=list)

    @property
    def done(self) -> int:
        return 0 if self.kv is None else self.kv.length

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


@dataclass(eq=False)
class Encoding:
    """A missing span being encoded once for all requests that wait for it."""

    key: str
    sequence: Sequence
    persistent: bool  # whether it goes to the store as well as the pool
    waiters: set[Request] = field(default_factory=set)


@dataclass(eq=False)
class Request:
    """One plan to be answered (or only encoded), from submission to its result."""

    plan: Plan
    keys: list[str]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    sequence: Sequence  # the prompt span, and the answer as it grows
    encode_only: bool  # finish as soon as everything its prompt span reads is encoded
    answer: tuple[int, ...]  # scored instead of decoding; all but its last token end the prompt span
    keep_logits: bool
    submitted: float
    usage: Usage
    missing: set[str] = field(default_factory=set)  # encodings it waits for
    held: set[str] = field(default_factory=set)
    token_ids: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
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


def sequence_of(span: Span, keys: list[str], room: int = 0) -> Sequence:
    """A span in its own frame (first position 0), with its places' keys and `room` for further tokens."""
    positions = np.asarray(span.positions, dtype=np.int64) - span.start
    groups = (Group(), *span.groups)
    places = [(keys[p.span], (p.at - span.start, p.lo, p.hi or 0, p.group, *groups[p.group])) for p in span.sees]
    return Sequence(list(span.tokens), positions, _joined(places), len(span) + room)


def _joined(places: list[Seen]) -> list[Seen]:
    """The places, with many slices of one record merged into one whose gaps are hidden."""
    slices: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for key, (at, lo, hi, *weights) in places:
        slices.setdefault((key, at, *weights), []).append((lo, hi))
    joined: list[Seen] = []
    for (key, at, *weights), found in slices.items():
        found.sort()
        gaps = [(hi, lo) for (_, hi), (lo, _) in pairwise(found)]
        if len(found) > MOST_SLICES and all(lo <= hi for lo, hi in gaps):  # overlapping slices count twice
            joined.append((key, (at, found[0][0], found[-1][1], *weights, gaps)))
        else:
            joined += [(key, (at, lo, hi, *weights)) for lo, hi in found]
    return joined
