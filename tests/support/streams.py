"""A GPU's copies without a GPU: streams that copy as late as they may."""

from __future__ import annotations

import torch


class Late:
    """A stream whose copies are made when somebody waits for them, and not before. Until then, the targets hold NaN."""

    def __init__(self):
        self.pending: list[Mark] = []
        self.marks: list[Mark] = []
        self.follows = 0
        self.broken = False

    def follow(self):
        self.follows += 1

    def hold(self, tensor):
        tensor.fill_(torch.nan)

    def copy(self, pairs):
        if self.broken:
            raise RuntimeError("no copies today")
        mark = Mark(self, list(pairs))
        self.pending.append(mark)
        self.marks.append(mark)
        return mark


class Mark:
    """The event behind some copies."""

    def __init__(self, stream, pairs):
        self.stream, self.pairs, self.waits = stream, pairs, 0

    def wait(self):
        self.waits += 1
        while not self.query():
            first = self.stream.pending.pop(0)
            for target, source in first.pairs:
                target.copy_(source)
            first.pairs = []

    synchronize = wait

    def query(self):
        return self not in self.stream.pending
