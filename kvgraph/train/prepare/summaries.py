"""Summaries: XSum and Multi-News, with the prompts and segments of the evaluation tasks of these names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvgraph.data.task import Hub, Item, Task, TaskError
from kvgraph.data.tasks.multi_news import MULTI_NEWS as MULTI_NEWS_TASK
from kvgraph.data.tasks.xsum import XSUM as XSUM_TASK
from kvgraph.train.prepare.source import Outcome, PrepareError, PrepareJob, RawRow, Skip, Source, task_record

SHORTEST, LONGEST = 1000, 3000  # tokens of an article; of article and summary together, exclusive


def summaries(
    task: Task, check: Callable[[Item, PrepareJob], None]
) -> Callable[[Iterator[RawRow], PrepareJob], Iterator[Outcome]]:
    """`Source.outcomes` for a task with one item per record. check: raises Skip for an unwanted item."""

    def outcomes(rows: Iterator[RawRow], job: PrepareJob) -> Iterator[Outcome]:
        for row in rows:
            try:
                (item,) = task.items([row.record])
                check(item, job)
                yield Outcome(row, _articles(item), (task_record(task, item, item.references[0]),))
            except TaskError as error:
                raise PrepareError(f"{row.where}: {error}") from None
            except Skip as reason:
                yield Outcome(row, skipped=str(reason))

    return outcomes


def _articles(item: Item) -> str:
    return "".join(document.text for document in item.documents)


def _xsum(item: Item, job: PrepareJob) -> None:
    tokens = job.tokenizer.count(_articles(item))
    if tokens < SHORTEST:
        raise Skip(f"shorter than {SHORTEST:,} tokens")
    if tokens + job.tokenizer.count(item.references[0]) >= LONGEST:
        raise Skip(f"{LONGEST:,} tokens or longer")


def _multi_news(item: Item, job: PrepareJob) -> None:
    if len(item.documents) < 2:
        raise Skip("fewer than two articles")


def _hub(name: str) -> Hub:
    return Hub(name, split="train", revision="refs/convert/parquet")


XSUM = Source(
    name="xsum",
    about="XSum: articles of 1,000 to 3,000 tokens in segments, and one sentence about each",
    origin="KVLink (arXiv 2502.16002; github.com/UCSB-NLP-Chang/KVLink: xsum.py). There, segments have 100 tokens (220 from "
    "1,900 on) and the system message is counted in the 3,000",
    hub=_hub("EdinburghNLP/xsum"),
    sample="xsum.jsonl",
    outcomes=summaries(XSUM_TASK, _xsum),
    needs_tokenizer=True,
)

MULTI_NEWS = Source(
    name="multi-news",
    about="Multi-News: articles on one event, and a summary of all",
    origin="Multi-News (arXiv 1906.01749)",
    hub=_hub("alexfabbri/multi_news"),
    sample="multi_news.jsonl",
    outcomes=summaries(MULTI_NEWS_TASK, _multi_news),
)
