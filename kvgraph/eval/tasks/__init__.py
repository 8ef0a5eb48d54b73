"""Tasks, one small file each. To add one, add a file and a line in TASKS."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvgraph.data.task import Task, TaskError
from kvgraph.eval.tasks.arxiv_qa import ARXIV_QA
from kvgraph.eval.tasks.blockqa import BLOCK_2WIKI, BLOCK_HOTPOTQA, BLOCK_NQ, BLOCK_TRIVIAQA
from kvgraph.eval.tasks.hotpotqa import HOTPOTQA
from kvgraph.eval.tasks.longbench_v2 import LONGBENCH_V2
from kvgraph.eval.tasks.morehopqa import MOREHOPQA
from kvgraph.eval.tasks.multi_news import MULTI_NEWS
from kvgraph.eval.tasks.multihop_rag import MULTIHOP_RAG
from kvgraph.eval.tasks.musique import MUSIQUE
from kvgraph.eval.tasks.nq import NQ, NQ_POSITIONS
from kvgraph.eval.tasks.ruler import RULER
from kvgraph.eval.tasks.samsum import SAMSUM
from kvgraph.eval.tasks.scisumm import SCISUMM
from kvgraph.eval.tasks.topics import TOPICS
from kvgraph.eval.tasks.triviaqa import TRIVIAQA
from kvgraph.eval.tasks.unarxive import UNARXIVE
from kvgraph.eval.tasks.wiki2 import WIKI2
from kvgraph.eval.tasks.world import WORLD_CHUNKS, WORLD_HOPS
from kvgraph.eval.tasks.xsum import XSUM

__all__ = ["TASKS", "get"]

TASKS: Mapping[str, Task] = MappingProxyType(
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
            WORLD_HOPS,
            WORLD_CHUNKS,
        )
    }
)
"""Tasks by name."""


def get(name: str) -> Task:
    """The task called `name`. Raises TaskError listing all names when there is none."""
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
