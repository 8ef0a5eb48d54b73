"""Examples packed into sequences: tokens, positions, and a compact description of visibility that fits any kernel.

Shapes: T tokens of a sequence, S spans, B blocks (runs of a span's tokens that every reader sees entirely or not at all),
N tokens to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvgraph.errors import PlanError
from kvgraph.methods import Method
from kvgraph.plan import lay_out
from kvgraph.train.example import Example, join


@dataclass(frozen=True)
class Packed:
    """One sequence of examples that don't see each other.

    tokens, positions [T] int64: positions start at 0 in every example, and only their differences within an example matter.
    span, block [T] int64: the span and the block that a token belongs to.
    sees [S, B] bool: whether a span reads a block. It always reads its own blocks. Token q sees token k if
        sees[span[q], block[k]] and k is q or has a lower position.
    rows, targets [N] int64: the logits of token rows[i] should predict token targets[i]. A row may occur several times.
    documents [N] bool: whether the target is a document's token instead of an answer's.
    lengths: tokens of every example, in order.
    """

    tokens: Tensor
    positions: Tensor
    span: Tensor
    block: Tensor
    sees: Tensor
    rows: Tensor
    targets: Tensor
    documents: Tensor
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of tokens to learn: (of answers, of documents)."""
        documents = int(self.documents.sum())
        return len(self.documents) - documents, documents

    def to(self, device: torch.device | str) -> Packed:
        """The same on a device."""
        tensors: dict[str, Any] = {k: moved(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def arrays(self) -> dict[str, Any]:
        """The same as numpy arrays; the inverse of `Packed.of`."""
        return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @classmethod
    def of(cls, arrays: dict[str, Any]) -> Packed:
        """The sequence that `arrays` made arrays of."""
        tensors: dict[str, Any] = {k: torch.from_numpy(v) for k, v in arrays.items() if isinstance(v, np.ndarray)}
        return cls(**(arrays | tensors))

    @property
    def slices(self) -> list[slice]:
        """The slice of every example."""
        return [slice(lo, hi) for lo, hi in pairwise(accumulate(self.lengths, initial=0))]

    def visible(self, window: int | None = None, here: slice = slice(None)) -> Tensor:
        """[T, T] bool: whether row sees column; with `here`, only for those tokens. window: only at smaller distances of positions."""
        tokens = torch.arange(len(self), device=self.tokens.device)[here]
        return self.mask_mod(window)(None, None, tokens[:, None], tokens[None])

    def mask_mod(self, window: int | None = None) -> Callable[[object, object, Tensor, Tensor], Tensor]:
        """The same as a function (batch, head, q, k) of indices, for `torch.nn.attention.flex_attention`."""
        positions, row, block, sees = self.positions, self.span * self.sees.shape[1], self.block, self.sees.flatten()

        def visible(batch: object, head: object, q: Tensor, k: Tensor) -> Tensor:
            distance = positions[q] - positions[k]
            reads = sees[row[q] + block[k]] & ((distance > 0) | (q == k))
            return reads if window is None else reads & (distance < window)

        return visible

    def padded(self, length: int) -> Packed:
        """The same with `length` tokens, and with `sees` padded to a size that most sequences share, so that kernels compile
        rarely.

        Padding tokens see only themselves. Raises ValueError for a length below T.
        """
        more = length - len(self)
        if more < 0:
            raise ValueError(f"a sequence of {len(self)} tokens can't be padded to {length}")
        spans, blocks = self.sees.shape
        least = length // 16 - 1  # few sequences have more, so that most share one size
        sides = [1 << max(n, least).bit_length() for n in (spans, blocks)]  # above both: padding has a span and a block
        sees = pad(self.sees, (0, sides[1] - blocks, 0, sides[0] - spans))
        sees[-1, -1] = True
        return replace(
            self,
            tokens=pad(self.tokens, (0, more)),
            positions=pad(self.positions, (0, more)),
            span=pad(self.span, (0, more), value=sides[0] - 1),
            block=pad(self.block, (0, more), value=sides[1] - 1),
            sees=sees,
            lengths=self.lengths + (more,) * (more > 0),
        )


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A copy to a GPU doesn't wait for its pending work."""
    gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if gpu and not tensor.is_cuda else tensor).to(device, non_blocking=gpu)


def pack(
    examples: Iterable[tuple[Example, Method]], length: int, *, limit: int | None = None, documents: bool = False
) -> list[Packed]:
    """Pack examples, each laid out by its method, into sequences of at most `length` tokens by first-fit.

    The same examples in the same order give the same sequences. Tokens that the questions of an example share occur once.
    documents: learn the documents too, not only the answers. limit: the number of positions of the model (Trainable.limit).
    Raises PlanError for an example that is longer than a sequence or has a position at or above the limit, GraphError if
    a method can't plan a graph.
    """
    laid = []
    for i, (example, method) in enumerate(examples):
        alone = lay(example, method, documents=documents)
        highest = int(alone.positions.max())
        if limit is not None and highest >= limit:
            raise PlanError(f"example {i} has position {highest}, but the model's limit is {limit} positions")
        if len(alone) > length:
            raise PlanError(
                f"example {i} has {len(alone)} tokens by {method.name}, more than the {length} of a sequence; "
                "shorten it, give it fewer questions, or allow longer sequences"
            )
        laid.append(alone)
    return [concatenated([laid[i] for i in group]) for group in first_fit(map(len, laid), length)]


def first_fit(sizes: Iterable[int], length: int) -> list[list[int]]:
    """Group examples of these sizes, none above `length`, into few groups of at most `length` tokens; returns their numbers."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i, size in enumerate(sizes):
        at = next((at for at, left in enumerate(room) if size <= left), None)
        if at is None:
            at = len(room)
            groups.append([])
            room.append(length)
        groups[at].append(i)
        room[at] -= size
    return groups


def lay(example: Example, method: Method, *, documents: bool = False, through_links: bool = False) -> Packed:
    """One example by itself, laid out by its method. Its targets are the answers' tokens, question by question, then the
    documents'. Raises the errors of `kvgraph.train.example.join`.
    """
    joined = join(example, method, documents=documents, through_links=through_links)
    laid = lay_out(joined.spans, joined.roots)
    spans = [joined.spans[x.span] for x in laid]
    bounds = list(accumulate(map(len, spans), initial=0))
    reads = [  # per laid-out span: the tokens from lo to hi that it reads
        [(lo, hi), *((bounds[child] + p.lo, bounds[child] + (p.hi or 0)) for child, p in x.sees)]
        for x, (lo, hi) in zip(laid, pairwise(bounds), strict=True)
    ]
    cuts = sorted({cut for slices in reads for lo, hi in slices for cut in (lo, hi)})
    number = {cut: block for block, cut in enumerate(cuts)}
    sees = torch.zeros(len(laid), len(cuts) - 1, dtype=torch.bool)
    for row, slices in zip(sees, reads, strict=True):
        for lo, hi in slices:
            row[number[lo] : number[hi]] = True
    positions = np.concatenate(
        [np.asarray(s.positions, np.int64) - s.start + x.start for s, x in zip(spans, laid, strict=True)]
    )
    first: dict[int, int] = {}  # where the first copy of a span starts
    for x, start in zip(laid, bounds, strict=False):
        first.setdefault(x.span, start)
    targets = [*joined.answers, *joined.documents]
    return Packed(
        tokens=torch.tensor([token for span in spans for token in span.tokens]),
        positions=torch.from_numpy(positions - positions.min()),
        span=torch.arange(len(laid)).repeat_interleave(torch.tensor(bounds).diff()),
        block=torch.arange(len(cuts) - 1).repeat_interleave(torch.tensor(cuts).diff()),
        sees=sees,
        rows=torch.tensor([first[t.span] + t.at for t in targets]),
        targets=torch.tensor([t.token for t in targets]),
        documents=torch.arange(len(targets)) >= len(joined.answers),
        lengths=(bounds[-1],),
    )


def concatenated(examples: Sequence[Packed]) -> Packed:
    """Examples side by side, which don't see each other."""

    def joined(name: str, sizes: Iterable[int] | None = None) -> Tensor:
        """A field of all examples, joined; with `sizes`, as indices offset by the sizes of the examples before."""
        offsets = accumulate(sizes, initial=0) if sizes is not None else repeat(0)
        return torch.cat([getattr(x, name) + offset for x, offset in zip(examples, offsets, strict=False)])

    return Packed(
        tokens=joined("tokens"),
        positions=joined("positions"),
        span=joined("span", (x.sees.shape[0] for x in examples)),
        block=joined("block", (x.sees.shape[1] for x in examples)),
        sees=torch.block_diag(*(x.sees for x in examples)),
        rows=joined("rows", map(len, examples)),
        targets=joined("targets"),
        documents=torch.cat([x.documents for x in examples]),
        lengths=tuple(map(len, examples)),
    )
