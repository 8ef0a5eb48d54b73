"""Context graphs, which users write: a prefix, text segments, a query, and who reads whom.

A piece of text is a `str` or a sequence of token ids. An edge (source, reader) lets segment `reader` read segment
`source`. The method decides what reading means. Pure Python.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from kvgraph.errors import GraphError

Text = str | Sequence[int]  # what callers pass: text or token ids
Piece = str | tuple[int, ...]  # what a graph holds
Ref = int | str  # a segment by index or by name
Edge = tuple[Ref, Ref]  # (source, reader)


@dataclass(frozen=True, init=False)
class ContextGraph:
    """A prefix, segments (documents), a query, and directed edges (source, reader) between segments.

    segments: a sequence of pieces, or a mapping name -> piece. Empty segments are allowed; they make no span.
    query: one piece. It may stay empty until a plan is made (see `with_query`).
    prefix: one piece, or a list of pieces encoded as a causal chain (a chat: one piece per message). A flat list of
        ints is one piece of token ids. Empty pieces are left out.
    edges: pairs (source, reader), each segment given by index or by name; kept as indices, in the order given.
    names: one unique name per segment, for edges and for `explain` (default: "doc 0", "doc 1", ...).
    chosen: the segments that the query reads, in this order, each given by index or by name; kept as indices. None
        means all. Only other segments read those that aren't chosen, along edges. A query about a few documents of a
        corpus thus finds them as they were encoded for the whole corpus.

    Raises GraphError, naming the segment or edge, for wrong types, token ids that are negative or not integers, names
    that are not unique, unknown segments, duplicate edges, and segments chosen twice. Self-edges are allowed.
    """

    segments: tuple[Piece, ...]
    query: Piece
    prefix: tuple[Piece, ...]
    edges: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    chosen: tuple[int, ...] | None

    def __init__(
        self,
        segments: Sequence[Text] | Mapping[str, Text],
        query: Text = "",
        prefix: Text | Sequence[Text] = "",
        edges: Iterable[Edge] = (),
        names: Sequence[str] | None = None,
        chosen: Iterable[Ref] | None = None,
    ) -> None:
        if isinstance(segments, Mapping):
            if names is not None:
                raise GraphError("segments given as a mapping bring their names; leave out names=")
            names = list(segments)
            segments = list(segments.values())
        pieces = _items(segments, "segments", "a list of segments or a mapping of names to segments")
        labels = _names(names, len(pieces))
        fields = {
            "segments": tuple(_piece(p, _who(i, labels)) for i, p in enumerate(pieces)),
            "query": _piece(query, "the query"),
            "prefix": _prefix(prefix),
            "edges": _edges(edges, labels),
            "names": labels,
            "chosen": None if chosen is None else _chosen(chosen, labels),
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def is_tokenized(self) -> bool:
        """Whether every piece is token ids (empty text counts as no tokens)."""
        return not any(isinstance(piece, str) and piece for piece in (*self.prefix, *self.segments, self.query))

    @property
    def has_query(self) -> bool:
        """Whether the query isn't empty."""
        return bool(self.query)

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> ContextGraph:
        """The graph with every text replaced by encode(text), one piece at a time; token ids stay as they are.

        `encode` must add no special tokens: BOS and chat-template text belong to the prefix.
        """

        def ids(piece: Piece) -> Text:
            if not isinstance(piece, str):
                return piece
            return encode(piece) if piece else ()

        segments, prefix = [ids(s) for s in self.segments], [ids(p) for p in self.prefix]
        return ContextGraph(segments, ids(self.query), prefix, self.edges, self.names, self.chosen)

    def with_query(self, query: Text) -> ContextGraph:
        """The same graph with another query; the segments are shared, not checked again."""
        new = copy.copy(self)
        object.__setattr__(new, "query", _piece(query, "the query"))
        return new

    @property
    def read(self) -> Sequence[int]:
        """The segments that the query reads: the chosen ones, or all."""
        return range(len(self.segments)) if self.chosen is None else self.chosen

    def restricted(self) -> ContextGraph:
        """The graph as if there were only the chosen segments, in the order chosen; the edges among them stay."""
        if self.chosen is None:
            return self
        new = {old: i for i, old in enumerate(self.chosen)}
        edges = [(new[s], new[r]) for s, r in self.edges if s in new and r in new]
        segments, names = [self.segments[i] for i in self.chosen], [self.names[i] for i in self.chosen]
        return ContextGraph(segments, self.query, list(self.prefix), edges, names)


def _who(index: int, names: Sequence[str]) -> str:
    return f"segment {index} ({names[index]})" if names[index] != f"doc {index}" else f"segment {index}"


def _items(value: Any, what: str, wanted: str) -> tuple[Any, ...]:
    """The items of a list-like value. Text, bytes, mappings and sets are refused."""
    if isinstance(value, (str, bytes, Mapping, AbstractSet)) or not isinstance(value, Iterable):
        raise GraphError(f"{what} must be {wanted}, not {type(value).__name__}")
    return tuple(value)


def _piece(value: Any, who: str) -> Piece:
    if isinstance(value, str):
        return value
    items = _items(value, who, "text or a sequence of token ids")
    if set(map(type, items)) <= {int}:  # a fast path for the usual case: documents are long
        ids = items
    else:
        ids = tuple(_token(item, i, who) for i, item in enumerate(items))
    if ids and min(ids) < 0:
        raise GraphError(f"{who}: token {ids.index(min(ids))} is {min(ids)}; token ids can't be negative")
    if ids and max(ids) >= 1 << 31:
        raise GraphError(f"{who}: token {ids.index(max(ids))} is above 2147483647; no vocabulary is that large")
    return ids


def check_text(text: str) -> str:
    """The text itself, if a tokenizer can read it. JSON can hold half of a surrogate pair: GraphError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GraphError(f"character {error.start} of a text is half of a surrogate pair; send whole ones") from None
    return text


def is_int(value: Any) -> bool:
    """Whether value is an integer of any library (numpy, torch), but not a bool."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _token(value: Any, index: int, who: str) -> int:
    if not is_int(value):
        raise GraphError(f"{who}: token {index} is {value!r}, a {type(value).__name__}; token ids are integers")
    return operator.index(value)


def _prefix(value: Any) -> tuple[Piece, ...]:
    if isinstance(value, str):
        pieces: tuple[Any, ...] = (value,)
    else:
        pieces = _items(value, "the prefix", "text, a sequence of token ids, or a list of such pieces")
        ints = sum(map(is_int, pieces))
        if pieces and ints == len(pieces):
            pieces = (pieces,)
        elif ints:
            raise GraphError("the prefix mixes token ids and pieces; make it one list of ids, or a list of pieces")
    checked = (_piece(p, f"piece {i} of the prefix" if len(pieces) > 1 else "the prefix") for i, p in enumerate(pieces))
    return tuple(p for p in checked if p)


def _names(names: Any, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"doc {i}" for i in range(count))
    labels = _items(names, "names", "a list of texts")
    if len(labels) != count:
        raise GraphError(f"there are {count} segments but {len(labels)} names")
    first: dict[str, int] = {}
    for i, name in enumerate(labels):
        if not isinstance(name, str) or not name:
            raise GraphError(f"the name of segment {i} is {name!r}; names are non-empty texts")
        if first.setdefault(name, i) != i:
            raise GraphError(f"segments {first[name]} and {i} are both named {name!r}; names must be unique")
    return labels


def _edges(edges: Any, names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    index = {name: i for i, name in enumerate(names)}
    kept: dict[tuple[int, int], None] = {}
    for edge in _items(edges, "edges", "a list of (source, reader) pairs"):
        what = f"edge {edge!r}"
        pair = _items(edge, what, "a pair (source, reader)")
        if len(pair) != 2:
            raise GraphError(f"{what} must be a pair (source, reader)")
        source, reader = _segment(pair[0], index, what), _segment(pair[1], index, what)
        if (source, reader) in kept:
            raise GraphError(f"{what} is given twice (segment {reader} reads segment {source}); give it once")
        kept[source, reader] = None
    return tuple(kept)


def _chosen(chosen: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    index = {name: i for i, name in enumerate(names)}
    kept: dict[int, None] = {}
    for ref in _items(chosen, "the chosen segments", "a list of their indices or names"):
        i = _segment(ref, index, "chosen")
        if i in kept:
            raise GraphError(f"{_who(i, names)} is chosen twice; choose it once")
        kept[i] = None
    return tuple(kept)


def _segment(ref: Any, index: Mapping[str, int], what: str) -> int:
    """The index of a segment given by index or name. `what` says where it was given, for errors."""
    if isinstance(ref, str):
        if ref not in index:
            raise GraphError(f"{what}: there is no segment named {ref!r}; there are {_listed(list(index))}")
        return index[ref]
    if not is_int(ref):
        raise GraphError(f"{what}: {ref!r} is neither the index nor the name of a segment")
    i = operator.index(ref)
    if not 0 <= i < len(index):
        known = f"there are segments 0 to {len(index) - 1}" if index else "the graph has no segments"
        raise GraphError(f"{what}: there is no segment {i}; {known}")
    return i


def _listed(names: Sequence[str], most: int = 8) -> str:
    if not names:
        return "none"
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
