"""Spans, places and plans: which tokens are computed together, at which positions, seeing which earlier spans.

A plan is the whole interface between methods (which know graphs and papers) and executors (which know tensors).
The rules, in full:

- Token i of a span attends to every key of its places whose position is *lower than its own position*, and to tokens
  <= i of its own span. It attends to nothing else.
- RoPE is relative, so every span lives in its own frame: only differences of positions matter, and a span's key is the
  same wherever it is placed.
- Cached spans see only cached spans. The last span is the prompt span: it is computed every time, and decoding
  continues from it.
- Everything a token attends to is one softmax, with one exception: places may form groups with a changed joint weight
  (see Group).
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kvgraph.errors import PlanError

KEY_FORMAT = b"kvgraph-key-1"
SIZES = tuple(size.to_bytes(8, "little") for size in range(200))  # of a place's line, which has a key and four numbers


class Place(NamedTuple):
    """A view of an earlier span: tokens lo..hi of span `span`, its token 0 standing at position `at` for the reader.

    group: the number of the reader's group that it belongs to, from 1; 0 for an ordinary place.
    """

    span: int
    at: int
    lo: int = 0
    hi: int | None = None  # None only before a Plan normalises it to the span's length
    group: int = 0


class Group(NamedTuple):
    """How a span weighs a group of its places: their keys are one softmax, which competes with all else as one key.

    temperature: divides the scores of the group's keys (inside a softcap).
    scale: multiplies the log-sum-exp of these scores over all keys of the group that a token sees. The product is the
        score of the one key.
    Source: APE (arXiv 2502.05431), section 4, where the group is the context.
    """

    temperature: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Span:
    """Tokens computed together.

    tokens: token ids.
    positions: strictly ascending, one per token; contiguous for documents, with gaps for a prompt span that holds link
        tokens.
    sees: places of earlier spans.
    cached: False for a span that is computed each time.
    groups: the groups that its places refer to.
    segment: index of the graph's segment that the span is a version of; None for every other span.
    round: the round of that version, 0 for the first; None for every other span.
    name: for people.

    Keys and comparisons ignore name, segment and round.
    """

    tokens: tuple[int, ...]
    positions: range | tuple[int, ...]
    sees: tuple[Place, ...] = ()
    cached: bool = True
    name: str = field(default="", compare=False)
    groups: tuple[Group, ...] = ()
    segment: int | None = field(default=None, compare=False)
    round: int | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def start(self) -> int:
        """Position of the first token: the origin of the span's own frame."""
        return self.positions[0]


@dataclass(frozen=True)
class Dense:
    """A plan as one problem.

    tokens, positions: [T]; positions may be negative.
    visible: [T, T] bool, row attends to column.
    span: [T], the index of the span that each row copies.
    prompt: number of rows of the prompt span, which are the last.
    group: [T, T], i + 1 where a row attends to a column as part of groups[i], 0 elsewhere; None without groups.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    span: np.ndarray
    prompt: int
    group: np.ndarray | None = None
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Spans in encoding order; the last is the prompt span. `method` names the method that made it, for people."""

    spans: tuple[Span, ...]
    method: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        checked: list[Span] = []
        before: tuple[Place, ...] = ()  # the places of the last cached span as they were given
        fine: set[int] = set()  # ids of tokens that were checked: versions of a segment share them
        for i, span in enumerate(self.spans):
            same = len(before) if span.sees[: len(before)] == before else 0
            places = checked[-1].sees if same else ()
            checked.append(_checked(i, span, self.spans, places, id(span.tokens) in fine))
            if checked[-1].tokens is span.tokens:
                fine.add(id(span.tokens))
            before = span.sees if span.cached and not span.groups and isinstance(span.sees, tuple) else ()
        object.__setattr__(self, "spans", tuple(checked))
        if not self.spans:
            raise PlanError("a plan needs at least one span: the prompt span")
        if self.spans[-1].cached:
            raise PlanError("the last span of a plan is the prompt span and can't be cached; set cached=False")

    @property
    def prompt(self) -> Span:
        """The last span, which decoding continues from."""
        return self.spans[-1]

    @property
    def highest_position(self) -> int:
        """The highest position in use, as the methods count them (absolute)."""
        return max(s.positions[-1] for s in self.spans)

    def keys(self, fingerprint: str, salt: str = "") -> list[str | None]:
        """Merkle key (64 hex digits) of every cached span, None for the others.

        A key covers everything that can change a span's KV: the model fingerprint, the tenant's salt, the tokens, the
        positions relative to the span's first, its places with their own keys, as a multiset, and its groups.
        """
        keys: list[str | None] = []
        lines = _Lines()
        for span in self.spans:
            keys.append(_key(span, lines.of(span, keys), fingerprint, salt) if span.cached else None)
        return keys

    def dense(self) -> Dense:
        """Lay the plan out as one (tokens, positions, visibility) problem; see `lay_out`."""
        return _dense(self)


def pruned(spans: Sequence[Span], method: str = "") -> Plan:
    """The plan of `spans`, without those that the prompt span reads neither directly nor through another span."""
    wanted = {i for i, s in enumerate(spans) if not s.cached}
    for i in reversed(range(len(spans))):
        if i in wanted:
            wanted.update(p.span for p in spans[i].sees)
    new = {old: i for i, old in enumerate(sorted(wanted))}
    kept = (replace(spans[i], sees=tuple(p._replace(span=new[p.span]) for p in spans[i].sees)) for i in sorted(wanted))
    return Plan(tuple(kept), method)


def _checked(index: int, span: Span, earlier: Sequence[Span], known: tuple[Place, ...], fine: bool) -> Span:
    """The span with its places normalised (hi filled in); raises PlanError naming the span and the rule it breaks.

    known: the first of its places, normalised. Each span of a long chain sees what the one before it sees, so each place
    is checked once, and is the same object for all its readers. fine: its tokens were checked in another span.
    """
    who = f"span {index}" + (f" ({span.name})" if span.name else "")
    if not span.tokens:
        raise PlanError(f"{who} is empty; leave empty spans out of the plan")
    tokens = span.tokens if fine else _integers(span.tokens, f"{who}: tokens")
    span = replace(span, tokens=tokens, positions=_integers(span.positions, f"{who}: positions"))
    if len(span.positions) != len(span.tokens):
        raise PlanError(f"{who} has {len(span.tokens)} tokens but {len(span.positions)} positions")
    if isinstance(span.positions, range):
        ascending = span.positions.step > 0
    else:
        ascending = all(a < b for a, b in zip(span.positions, span.positions[1:], strict=False))
    if not ascending:
        raise PlanError(f"{who}: positions must be strictly ascending")
    groups = tuple(_group(group, f"{who}: group {i}") for i, group in enumerate(span.groups, 1))
    more = (_checked_place(given, index, span, len(groups), earlier, who) for given in span.sees[len(known) :])
    return replace(span, sees=(*known, *more), groups=groups)


def _checked_place(
    given: Place | tuple[int, ...], index: int, span: Span, groups: int, earlier: Sequence[Span], who: str
) -> Place:
    place = _place(given)
    _integers(tuple(x for x in place if x is not None), f"{who}: a place's numbers")
    if not 0 <= place.span < index:
        raise PlanError(f"{who} sees span {place.span}, which isn't earlier in the plan")
    child = earlier[place.span]
    hi = len(child) if place.hi is None else place.hi
    if not 0 <= place.lo < hi <= len(child):
        raise PlanError(f"{who} sees tokens {place.lo}..{hi} of span {place.span}, which has {len(child)}")
    if span.cached and not child.cached:
        raise PlanError(f"{who} is cached but sees span {place.span}, which is not")
    if not 0 <= place.group <= groups:
        raise PlanError(f"{who} has a place in group {place.group}, but {groups} groups")
    return place._replace(hi=hi)


def _place(place: Place | tuple[int, ...]) -> Place:
    try:
        return Place(*place)
    except TypeError:
        raise PlanError(f"{place!r} isn't a Place(span, at, lo, hi, group)") from None


def _group(group: Group | tuple[float, ...], what: str) -> Group:
    """The group as floats; raises PlanError unless both lie well inside the range where float32 scores stay finite."""
    try:
        checked = Group(*map(float, group))
    except (TypeError, ValueError):
        raise PlanError(f"{what} must be Group(temperature, scale), not {group!r}") from None
    for name, value in checked._asdict().items():
        if not 1e-3 <= value <= 1e3:  # false for NaN
            raise PlanError(f"{what} has {name} {value:g}; it must be from 0.001 to 1000")
    return checked


def _integers(values: Sequence[int], what: str) -> Any:
    """The values as integers; raises PlanError unless they fit a key's 64 bits with room for sums."""
    if not isinstance(values, range) and not set(map(type, values)) <= {int}:
        try:
            values = tuple(operator.index(v) for v in values)
        except TypeError:
            raise PlanError(f"{what} must be integers") from None
    ends = (values[0], values[-1]) if isinstance(values, range) and values else values
    if values and not -1 << 60 < min(ends) <= max(ends) < 1 << 60:
        raise PlanError(f"{what} are out of range: they must be below 2**60")
    return values


def _key(span: Span, places: bytes, fingerprint: str, salt: str) -> str:
    """The key of a span. places: what `_Lines` gives for those that it sees."""
    h = hashlib.sha256()

    def add(data: bytes) -> None:  # length-prefixed, so that no two different inputs give the same bytes
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)

    add(KEY_FORMAT)
    add(fingerprint.encode())
    add(salt.encode())
    add(np.array(span.tokens, dtype="<i8").tobytes())
    if isinstance(span.positions, range) and span.positions.step == 1:
        add(b"range")
    else:
        relative = np.asarray(span.positions, dtype="<i8") - span.start
        add(b"range" if relative[-1] == len(span) - 1 else relative.tobytes())
    h.update(places)
    for weights in span.groups:  # 16 bytes, so it can't be taken for a place
        add(np.array(weights, dtype="<f8").tobytes())
    return h.hexdigest()


class _Lines:
    """The part of a key that its places are: a line for each, "key at lo hi group", sorted, each after its length.

    Each span of a long chain sees all before it, so a chain's keys are made of a number of lines that grows with its
    square. Here a line costs little: a span that sees what the one before it sees, and more, only adds to a sorted list.
    """

    def __init__(self) -> None:
        self._sees: tuple[Place, ...] = ()  # of the span before
        self._sorted: list[tuple[str, int, int, int, int]] = []  # (key, at, lo, hi, group)
        self._written: list[tuple[bytes, int, bytes]] = []  # the same: what a line has before `at`, `at`, and after it

    def of(self, span: Span, keys: Sequence[str | None]) -> bytes:
        """The lines of a span's places. keys: of the spans before it."""
        same = len(self._sees)
        if span.sees[:same] != self._sees:
            same, self._sorted, self._written = 0, [], []
        self._sees, start = span.sees, span.start
        for p in span.sees[same:]:
            place = (keys[p.span] or "", p.at, p.lo, p.hi or 0, p.group)
            index = bisect_left(self._sorted, place)
            self._sorted.insert(index, place)
            rest = " ".join(map(str, place[2:] if p.group else place[2:4]))
            self._written.insert(index, (f"{place[0]} ".encode(), p.at, f" {rest}".encode()))
        return b"".join(
            [SIZES[len(line := b"%b%d%b" % (before, at - start, after))] + line for before, at, after in self._written]
        )


class Laid(NamedTuple):
    """A span laid out with token 0 at `start`. sees: what it reads, as (index of another laid-out span, view)."""

    span: int
    start: int
    sees: tuple[tuple[int, Place], ...]


def lay_out(spans: Sequence[Span], roots: Sequence[int]) -> list[Laid]:
    """The spans `roots` at their positions, each after all that it reads; what several read at one position is shared.

    A span read at two positions is laid out twice, with its ancestors; this is exact, because KV is relative. A span
    that one reader sees twice is laid out twice too, because a duplicate counts twice in the softmax.
    """
    reads: dict[_Standing, list[tuple[_Standing, Place]]] = {}
    found: dict[_Standing, int] = {}  # -> its index in the result
    laid: list[Laid] = []
    for root in roots:
        stack = [_Standing(root, spans[root].start)]
        while stack:  # depth first, without recursion: plans may be thousands of spans deep
            here = stack[-1]
            if here not in reads:
                reads[here] = _reads(spans[here.span], here.start)
                stack += [child for child, _ in reversed(reads[here]) if child not in found]
                continue
            stack.pop()
            if here not in found:
                found[here] = len(laid)
                sees = tuple((found[child], place) for child, place in reads[here])
                laid.append(Laid(here.span, here.start, sees))
    return laid


class _Standing(NamedTuple):
    """A span at a position. copy: which of several there; one reader's views of one copy don't overlap."""

    span: int
    start: int
    copy: int = 0


def _reads(span: Span, start: int) -> list[tuple[_Standing, Place]]:
    """What a span laid out at `start` reads, and by which of its places."""
    copies: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}  # (span, start) -> slices seen of each copy
    found = []
    for place in span.sees:
        at, hi = place.at - span.start + start, place.hi or 0
        slices = copies.setdefault((place.span, at), [])
        # Views of one copy mustn't overlap, or its columns would count only once.
        n = 0
        while n < len(slices) and any(lo < hi and place.lo < h for lo, h in slices[n]):
            n += 1
        if n == len(slices):
            slices.append([])
        slices[n].append((place.lo, hi))
        found.append((_Standing(place.span, at, n), place))
    return found


def _dense(plan: Plan) -> Dense:
    spans = plan.spans
    laid = lay_out(spans, [len(spans) - 1])
    bounds = np.cumsum([0, *(len(spans[x.span]) for x in laid)])
    pos = np.concatenate([np.asarray(spans[x.span].positions, np.int64) - spans[x.span].start + x.start for x in laid])
    groups = tuple(group for span in spans for group in span.groups)
    before = np.cumsum([0, *(len(span.groups) for span in spans)])  # groups of the spans before each
    visible = np.zeros((len(pos), len(pos)), dtype=bool)
    grouped = np.zeros(visible.shape, dtype=np.int64) if groups else None
    for (lo, hi), x in zip(pairwise(bounds), laid, strict=True):
        rows = slice(lo, hi)
        visible[rows, rows] = np.tri(hi - lo, dtype=bool)
        for child, p in x.sees:
            c = slice(bounds[child] + p.lo, bounds[child] + (p.hi or 0))
            visible[rows, c] = pos[rows, None] > pos[None, c]
            if grouped is not None and p.group:
                grouped[rows, c] = np.where(visible[rows, c], before[x.span] + p.group, 0)
    tokens = np.concatenate([np.array(spans[x.span].tokens, dtype=np.int64) for x in laid])
    span_of = np.repeat([x.span for x in laid], np.diff(bounds))
    return Dense(tokens, pos, visible, span_of, len(spans[-1]), grouped, groups)


def contiguous(
    tokens: Iterable[int],
    start: int,
    sees: Sequence[Place] = (),
    *,
    cached: bool = True,
    name: str = "",
    groups: Sequence[Group] = (),
    segment: int | None = None,
    round: int | None = None,
) -> Span:
    """A span of `tokens` at positions start, start+1, ..."""
    ids = tuple(tokens)
    return Span(ids, range(start, start + len(ids)), tuple(sees), cached, name, tuple(groups), segment, round)
