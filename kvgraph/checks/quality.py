"""What a method, and a codec, cost a model: how likely given answers are with them and without, on identical tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import kl_div

from kvgraph.data import io
from kvgraph.errors import GraphError
from kvgraph.graph import ContextGraph, Text
from kvgraph.methods import Method
from kvgraph.progress import Progress

# Log-probabilities [n] of the tokens of an answer after a graph's query, under a method; see `Engine.scores`.
Score = Callable[[ContextGraph, Text, str | Method], Tensor]


@dataclass(frozen=True)
class Quality:
    """Mean negative log-likelihood (nats a token) of given answers under a method and under `full`.

    codec_nll: under the method, where a codec has packed what is read; None if none was asked for.
    """

    method: str
    items: int
    tokens: int
    nll: float
    full_nll: float
    codec: str = "raw"
    codec_nll: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """A method beside `full`, at the same tokens of an answer.

    kl: nats a token by which the method's next-token distribution differs from `full`'s, KL(full || method). agreement:
    the share of tokens where both have the same most likely next token.
    """

    tokens: int
    kl: float
    agreement: float


def compared(composed: Tensor, plain: Tensor) -> Fidelity:
    """Compare log-probabilities [n, V] of a method and of `full` at the same n tokens."""
    kl = kl_div(composed.double(), plain.double(), reduction="none", log_target=True)
    agreement = (composed.argmax(-1) == plain.argmax(-1)).double()
    return Fidelity(len(plain), float(kl.sum(-1).mean()), float(agreement.mean()))


def quality(
    score: Score,
    method: str | Method,
    items: Iterable[tuple[ContextGraph, Text]],
    progress: bool | None = None,
    coded: tuple[str, Score] | None = None,
) -> Quality:
    """Score every (graph, answer) with `method` and with `full` on identical tokens.

    coded: a codec, and what scores with records that it has packed: that with `method` too.
    """
    pairs = list(items)
    if not pairs:
        raise GraphError("no items to measure: the data file is empty")
    sums, tokens = [0.0, 0.0, 0.0], 0
    name = method if isinstance(method, str) else method.name
    with Progress(f"scoring {name} against full", len(pairs), enabled=progress) as bar:
        for graph, answer in pairs:
            plain = ContextGraph(graph.segments, query=graph.query, prefix=graph.prefix)
            scores = [score(graph, answer, method), score(plain, answer, "full")]
            if coded is not None:
                scores.append(coded[1](graph, answer, method))
            for i, s in enumerate(scores):
                sums[i] -= float(s.sum())
            tokens += len(scores[0])
            bar.advance(1)
    found = Quality(name, len(pairs), tokens, sums[0] / tokens, sums[1] / tokens)
    return found if coded is None else replace(found, codec=coded[0], codec_nll=sums[2] / tokens)


def read_items(path: Path, limit: int | None = None) -> list[tuple[ContextGraph, str]]:
    """Records {"question", "answer", "documents": [text or {"title", "text"}], "prefix"?, "edges"?} as graphs.

    path: a file or folder that `kvgraph.data.io` reads. limit: read only the first items. Raises GraphError, naming file
    and line, for any other record.
    """
    items: list[tuple[ContextGraph, str]] = []
    for where, row in islice(io.records(path, GraphError), limit):
        try:
            items.append(_item(row))
        except GraphError as error:
            raise GraphError(f"{where}: {error}") from None
    return items


def _item(row: dict[str, Any]) -> tuple[ContextGraph, str]:
    """(graph, answer) of one record of a data file. Raises GraphError saying which field is wrong."""
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise GraphError(f'needs "{field}", which must be non-empty text{_found(row, field)}')
    documents, edges, prefix = row.get("documents"), row.get("edges", []), row.get("prefix", "")
    if not isinstance(documents, list):
        raise GraphError(f'needs "documents", a list of texts or of {{"title", "text"}}{_found(row, "documents")}')
    if not isinstance(edges, list) or not all(isinstance(e, list) and len(e) == 2 for e in edges):
        raise GraphError(f'"edges" must be a list of pairs [source, reader]{_found(row, "edges")}')
    if not isinstance(prefix, str):
        raise GraphError(f'"prefix" must be text{_found(row, "prefix")}')
    texts = [_document(d, i) for i, d in enumerate(documents)]
    return ContextGraph(texts, row["question"], prefix, [(source, reader) for source, reader in edges]), row["answer"]


def _document(value: Any, index: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and all(isinstance(value.get(field), str) for field in ("title", "text")):
        return f"{value['title']}\n{value['text']}\n"
    raise GraphError(f'document {index} must be text or an object with the texts "title" and "text"')


def _found(row: dict[str, Any], field: str) -> str:
    """What a field has instead, for messages."""
    return f"; it is {json.dumps(row[field], ensure_ascii=False)[:40]}" if field in row else "; there is none"
