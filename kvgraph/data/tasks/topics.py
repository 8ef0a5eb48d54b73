"""Topics of nodes in a network of texts (Cora, PubMed, WebKB): a text is read together with its neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from kvgraph.data.chat import Document
from kvgraph.data.schema import Text, checked
from kvgraph.data.task import Item, Task, TaskError

NEIGHBOURS = 20  # maximum; few nodes have more, but those have hundreds
QUOTED = 80  # characters of a text that name it in the question


def _listed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


Id = Annotated[str, BeforeValidator(str)]


class NodeRecord(BaseModel):
    """A row of a text-attributed graph: a node, its text, its category's name, and the nodes it points to."""

    node_id: Id
    text: Text = Field(validation_alias=AliasChoices("raw_text", "text"))
    category: Text
    neighbours: Annotated[list[Id], BeforeValidator(_listed)] = Field(validation_alias="neighbor_ids")


def items(records: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
    """One item per node: its first NEIGHBOURS neighbours in the record's order, then its own text, which reads them.

    Needs the whole graph, and one graph at a time. The question names the text by its beginning, because its place
    among the documents may change, and lists all categories of the graph. A node isn't its own neighbour.
    """
    nodes: dict[str, NodeRecord] = {}
    for record in checked(NodeRecord, records):
        if nodes.setdefault(record.node_id, record) is not record:
            raise TaskError(f"node_id {record.node_id} occurs twice; give one graph at a time")
    categories = ", ".join(sorted({node.category for node in nodes.values()}))
    for node in nodes.values():
        near = [name for name in dict.fromkeys(node.neighbours) if name != node.node_id][:NEIGHBOURS]
        if missing := [name for name in near if name not in nodes]:
            raise TaskError(f"node_id {node.node_id}: neighbor_ids names {missing[0]}, but the graph has no such node")
        yield Item(
            id=node.node_id,
            question=f'Which of these categories is right for the text that begins "{node.text[:QUOTED].strip()}"?\n'
            f"Categories: {categories}",
            references=(node.category,),
            documents=tuple(Document(nodes[name].text, id=name) for name in (*near, node.node_id)),
            kind=node.category,
            facts={"neighbours": len(near), "gold_positions": str(len(near))},
            links=tuple((i, len(near)) for i in range(len(near))),
        )


TOPICS = Task(
    name="topics",
    about="Topic classification in a network of texts: the category of a node that reads its neighbours",
    source="Graph-KV (arXiv 2506.07334), paper topic classification; tables as in github.com/sktsherlock/TAG-Benchmark: "
    "node_id, raw_text, category, neighbor_ids, as .csv or .jsonl",
    items=items,
    instruction="Here are texts of a network. Linked texts are often, but not always, of the same category.\n\n",
    question="{question}\nAnswer with one of the categories and nothing else.\nCategory:",
    max_tokens=20,
    metrics=("accuracy",),
    extract="first_line",
    edges="links",
    breakdowns=("kind", "neighbours"),
)
