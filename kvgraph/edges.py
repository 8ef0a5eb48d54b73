"""Common shapes of edges. Each function returns a tuple of pairs (source, reader). Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from kvgraph.errors import GraphError
from kvgraph.graph import Edge, Ref, is_int
from kvgraph.registry import Registry


def all_pairs(n: int, self_edges: bool = False) -> tuple[Edge, ...]:
    """Every one of n segments reads every other (and itself, with `self_edges`)."""
    return top_k(n, 0, self_edges)


def top_k(n: int, k: int, self_edges: bool = False, last: bool = False) -> tuple[Edge, ...]:
    """Every one of n segments reads the first k (with `last`, the last k). k=0, or k above n, means all.

    A source reads the other sources, and itself with `self_edges`.
    """
    _count("n", n)
    _count("k", k)
    if k == 0 or k > n:
        k = n
    sources = range(n - k, n) if last else range(k)
    return tuple((s, r) for r in range(n) for s in sources if self_edges or s != r)


def star(center: Ref, neighbours: Iterable[Ref]) -> tuple[Edge, ...]:
    """The center reads each of its neighbours. Raises GraphError when it is its own neighbour."""
    edges = tuple((neighbour, center) for neighbour in neighbours)
    if (center, center) in edges:
        raise GraphError(f"segment {center!r} is the center of a star and can't be its own neighbour; leave it out")
    return edges


def ego(groups: Iterable[tuple[Ref, Iterable[Ref]]]) -> tuple[Edge, ...]:
    """Several stars: groups of (center, neighbours)."""
    return tuple(edge for center, neighbours in groups for edge in star(center, neighbours))


def chain(n: int) -> tuple[Edge, ...]:
    """Each of n segments reads the one before it."""
    _count("n", n)
    return tuple(pairwise(range(n)))


def layered(layers: Iterable[Iterable[Ref]]) -> tuple[Edge, ...]:
    """Each segment of a layer reads every segment of the layer before, for multi-hop (top 1 -> top 2-4 -> the rest).

    Raises GraphError when a layer is empty (it would cut the graph in two) or a segment is in two layers.
    """
    lists = [list(layer) for layer in layers]
    home: dict[Ref, int] = {}
    for i, layer in enumerate(lists):
        if not layer:
            raise GraphError(f"layer {i} is empty; leave it out")
        for ref in layer:
            if ref in home:
                raise GraphError(f"segment {ref!r} is in layers {home[ref]} and {i}; a segment belongs to one layer")
            home[ref] = i
    return tuple((s, r) for above, below in pairwise(lists) for r in below for s in above)


Shape = Callable[[int, str, bool], tuple[Edge, ...] | None]
"""Edges among n segments from (n, the text after the colon, whether "+self" follows); None for a text it can't take."""


def _all(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    return None if argument else all_pairs(n, self_edges)


def _chain(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    return None if argument or self_edges else chain(n)


def _top_k(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    return top_k(n, int(argument), self_edges) if _is_number(argument) else None


def _last_k(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    return top_k(n, int(argument), self_edges, last=True) if _is_number(argument) else None


def _star(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    if self_edges or not _is_number(argument):
        return None
    return star(int(argument), [i for i in range(n) if i != int(argument)])


def _sizes(n: int, argument: str, self_edges: bool) -> tuple[Edge, ...] | None:
    sizes = argument.split("-")
    return None if self_edges or not all(map(_is_number, sizes)) else layered(_layers(list(map(int, sizes)), n))


SHAPES: Registry[Shape] = Registry(
    {"all": _all, "chain": _chain, "top-k": _top_k, "last-k": _last_k, "layers": _sizes, "star": _star},
    "kvgraph.edges",
    lambda name, shape: "" if callable(shape) else "it isn't a function",
)
"""Shapes of edges by name. Other packages can add some in the group "kvgraph.edges"."""


def named_edges(spec: str, names: Sequence[str]) -> tuple[Edge, ...]:
    """Edges among segments with these names, from one line of text, as commands, requests and evaluations accept it.

    - "" or "none": no edges.
    - "all": every segment reads every other.
    - "chain": each segment reads the one before it.
    - "top-k:N", "last-k:N": all read the first or last N.
    - "layers:1-3": layers of 1 segment, 3 segments and the rest; each layer reads the one before. Any number of sizes.
    - "star:N": segment N reads all others.
    - "0>2,1>2": pairs "source>reader" by name or number.

    With "+self" after "all", "top-k" or "last-k", sources also read themselves. Raises GraphError for any other text.
    """
    if spec.strip() in ("", "none"):
        return ()
    text, plus, after = spec.strip().partition("+self")
    shape, colon, argument = text.partition(":")
    if shape in SHAPES and not after and bool(colon) == bool(argument):
        made = SHAPES[shape](len(names), argument, bool(plus))
        if made is not None:
            return made
    pairs = [pair.split(">") for pair in spec.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise GraphError(
            f"edges {spec[:80]!r} aren't known; give all, chain, top-k:N, last-k:N, layers:1-3, star:N, "
            "or pairs such as 0>2,1>2"
        )
    known = set(names)

    def ref(text: str) -> Ref:
        text = text.strip()
        return int(text) if text not in known and _is_number(text) else text

    return tuple((ref(source), ref(reader)) for source, reader in pairs)


def names_segments(spec: str) -> bool:
    """Whether a line of text means certain segments (pairs, or the center of a star), however many there are."""
    return ">" in spec or spec.strip().startswith("star:")


def _layers(sizes: Sequence[int], count: int) -> list[range]:
    """Segments 0..count-1 in layers of these sizes, the rest in one more. Layers without segments are left out."""
    if 0 in sizes:
        raise GraphError("a layer of 0 segments would cut the graph in two; leave it out")
    starts = [0, *accumulate(sizes), count]
    return [r for a, b in pairwise(starts) if (r := range(min(a, count), min(b, count)))]


def _is_number(text: str) -> bool:
    """Whether it is a plain number. The limit is ample, and Python refuses numbers of thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _count(what: str, value: Any) -> None:
    if not is_int(value) or value < 0:
        raise GraphError(f"{what} must be an integer of at least 0, not {value!r}")
