"""Graph builders: rules by which the chunks of a corpus read each other, from what corpora really have.

A text names one: "links", or "links:k=4,within=false" with its fields. A plus sign joins several: "structure+links:k=4".
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from kvgraph.data.graphs.base import Combined, GraphBuilder, IndexEdges
from kvgraph.data.graphs.citations import Citations
from kvgraph.data.graphs.links import Links
from kvgraph.data.graphs.listed import EdgeList, Shape
from kvgraph.data.graphs.mentions import Mentions
from kvgraph.data.graphs.neighbours import Neighbours
from kvgraph.data.graphs.structure import Structure
from kvgraph.data.graphs.triples import Triples
from kvgraph.errors import GraphError
from kvgraph.methods import spec
from kvgraph.registry import Registry

__all__ = ["BUILDERS", "NONE", "Combined", "GraphBuilder", "IndexEdges", "format", "parse"]

NONE = "none"


def _wrong(name: str, builder: Any) -> str:
    if not (isinstance(builder, type) and issubclass(builder, GraphBuilder)):
        return "it isn't a class derived from kvgraph.data.graphs.base.GraphBuilder"
    return "" if builder.name == name else f"its name is {builder.name!r}"


BUILDERS: Registry[type[GraphBuilder]] = Registry(
    {cls.name: cls for cls in (Structure, Links, Citations, Mentions, Neighbours, Triples, EdgeList, Shape)},
    "kvgraph.graphs",
    _wrong,
)
"""Classes of builders by name. Other packages can add some in the group "kvgraph.graphs"."""


def parse(text: str) -> Combined:
    """The builders of "name:field=value,...+name". "none" and "" make no edges.

    Raises GraphError, listing the known names or fields, for an unknown one.
    """
    if text.strip() in ("", NONE):
        return Combined(())
    joint = rf"\+(?=\s*(?:{'|'.join(map(re.escape, BUILDERS))})\s*(?:[:+]|$))"  # values may hold a plus sign too
    return Combined(tuple(_one(part.strip(), text) for part in re.split(joint, text)))


def format(builders: Combined) -> str:
    """The text that `parse` reads as these builders: names, and fields that differ from the default."""
    return "+".join(map(_text, builders.parts)) or NONE


def _one(text: str, whole: str) -> GraphBuilder:
    name, _, rest = text.partition(":")
    if name not in BUILDERS:
        raise GraphError(f"there is no graph builder {name[:40]!r}; there are {', '.join(BUILDERS)}, and {NONE}")
    given = spec.values(rest, f"graph {whole[:80]!r}")
    known = [field.name for field in fields(BUILDERS[name])]
    for field in given:
        if field not in known:
            raise GraphError(f"graph builder {name} has no field {field!r}; it has {', '.join(known)}")
    return BUILDERS[name](**given)


def _text(builder: GraphBuilder) -> str:
    changed = [
        f"{field.name}={spec.text(getattr(builder, field.name))}"
        for field in fields(builder)
        if getattr(builder, field.name) != field.default
    ]
    return builder.name + (":" if changed else "") + ",".join(changed)
