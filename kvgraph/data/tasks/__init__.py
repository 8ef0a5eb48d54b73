"""Tasks, one small file each. To add a task, add a file and a line in TASKS."""

from __future__ import annotations

from kvgraph.data.task import Task, TaskError
from kvgraph.data.tasks.arxiv_qa import ARXIV_QA
from kvgraph.data.tasks.blockqa import BLOCK_2WIKI, BLOCK_HOTPOTQA, BLOCK_NQ, BLOCK_TRIVIAQA
from kvgraph.data.tasks.hotpotqa import HOTPOTQA
from kvgraph.data.tasks.linked_docs import LINKED_DOCS
from kvgraph.data.tasks.longbench_v2 import LONGBENCH_V2
from kvgraph.data.tasks.morehopqa import MOREHOPQA
from kvgraph.data.tasks.multi_news import MULTI_NEWS
from kvgraph.data.tasks.multihop_rag import MULTIHOP_RAG
from kvgraph.data.tasks.musique import MUSIQUE
from kvgraph.data.tasks.nq import NQ, NQ_POSITIONS
from kvgraph.data.tasks.ruler import RULER
from kvgraph.data.tasks.samsum import SAMSUM
from kvgraph.data.tasks.scisumm import SCISUMM
from kvgraph.data.tasks.topics import TOPICS
from kvgraph.data.tasks.triples import EXPLA_GRAPHS, WIKI2_TRIPLES
from kvgraph.data.tasks.triviaqa import TRIVIAQA
from kvgraph.data.tasks.unarxive import UNARXIVE
from kvgraph.data.tasks.wiki2 import WIKI2
from kvgraph.data.tasks.world import WORLD_CHUNKS, WORLD_HOPS
from kvgraph.data.tasks.xsum import XSUM
from kvgraph.registry import Registry, named

__all__ = ["TASKS", "get"]

TASKS: Registry[Task] = Registry(
    {
        task.name: task
        for task in (
            NQ,
            NQ_POSITIONS,
            TRIVIAQA,
            HOTPOTQA,
            WIKI2,
            MUSIQUE,
            MULTIHOP_RAG,
            MOREHOPQA,
            BLOCK_NQ,
            BLOCK_TRIVIAQA,
            BLOCK_HOTPOTQA,
            BLOCK_2WIKI,
            XSUM,
            MULTI_NEWS,
            SAMSUM,
            RULER,
            LONGBENCH_V2,
            ARXIV_QA,
            SCISUMM,
            UNARXIVE,
            TOPICS,
            EXPLA_GRAPHS,
            WIKI2_TRIPLES,
            LINKED_DOCS,
            WORLD_HOPS,
            WORLD_CHUNKS,
        )
    },
    "kvgraph.tasks",
    named(Task),
)
"""Tasks by name. Other packages can add some in the group "kvgraph.tasks"; see `kvgraph.registry`."""


def get(name: str) -> Task:
    """The task called `name`. Raises TaskError, listing all names, if there is none."""
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
