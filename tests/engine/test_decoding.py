"""Decode steps on a GPU bring the last step's tables up to date: each step's equal those made from nothing. No kernel runs."""

from __future__ import annotations

from copy import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import families
from kvgraph import ContextGraph, Engine, models
from kvgraph.edges import all_pairs
from kvgraph.engine import runner as runners
from kvgraph.engine.sampling import SamplingParams

if not find_spec("triton"):
    pytest.skip("triton isn't installed", allow_module_level=True)
from kvgraph.attention import cuda


class Nothing:
    """An event, or a graph: nothing is under way, and nothing runs again."""

    def record(self):
        pass

    def synchronize(self):
        pass

    def replay(self):
        pass


def contents(tables: cuda.Tables, step: cuda.CudaStep) -> list[np.ndarray]:
    """What the kernels of a step read of its tables."""
    layout = tables.layout
    found = [tables.view(s).numpy() for s in (layout.tokens, layout.positions, layout.want, layout.rows)]
    for window, sections in zip(step.tables, layout.windows, strict=True):
        found.append(tables.view(sections["counts"]).numpy())
        for name in ("shifts", "pairs", "blocks", "leads", "small", "large", "merged", "entries", "more"):
            found.append(tables.view(sections[name]).numpy()[: getattr(window, name).size])
    return found


class Checked(runners.CudaRunner):
    """Keeps its tables as on a GPU, compares them in every step, and takes the logits from the plain runner."""

    def __init__(self, model):
        super().__init__(model)
        self.plain = runners.Runner(model)
        self.model = copy(model)
        self.model.forward = lambda *_: torch.empty(0, 1)  # of a large step
        self.made = self.continued = 0

    def _captured(self, step, sizes, flags):
        tables = cuda.Tables(self.model.device, sizes, step.windows, flags.groups, step.scratch(sizes.tokens))
        return tables, Nothing(), torch.empty(sizes.tokens, 1)

    def _decode(self, rows):
        self.continued += 1
        return super()._decode(rows)

    def _replay(self, step):
        found = super()._replay(step)
        assert found is not None
        self.made += 1
        return found

    def run(self, rows, want):
        before = self.made + self.continued
        super().run(rows, want)
        if self.made + self.continued > before and self._decoding is not None:
            mine = self._decoding[0]._tables
            step = cuda.CudaStep(rows, want, self.model.layers, self.rotaries, self.model.device, self.model.heads)
            fresh = cuda.Tables(self.model.device, mine.sizes, step.windows, step.flags.groups, mine.scratch)
            fresh.fill(step, torch.empty(fresh.layout.end, dtype=torch.int64))
            for ours, theirs in zip(contents(mine, step), contents(fresh, step), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        return self.plain.run(rows, want)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(runners, "_event", Nothing)
    monkeypatch.setattr(cuda, "MIN_KEYS", 16)  # so that blocks are split, and their parts change as rows grow
    monkeypatch.setattr(cuda, "tuning", lambda *_: cuda.Tuning(32, 16, (4, 4), 2, (16, 16)))


def prompt(documents: int, length: int, method: str, query: int = 50) -> ContextGraph:
    texts = [[5 + (7 * i + j) % 100 for j in range(length)] for i in range(documents)]
    return ContextGraph(texts, [3, 4, query], [2, 1], all_pairs(documents) if method == "graph-kv" else [])


# (documents, their length, method): few long ones, ones that are gathered, ones in groups, and none
KINDS = [(3, 40, "block"), (20, 5, "block"), (3, 30, "ape"), (3, 9, "graph-kv"), (0, 0, "full")]


def answer(engine: Engine) -> list[list[int]]:
    """The answers of requests that come one after another, some of which end or are cancelled while others decode."""
    requests = []
    for i, (documents, length, method) in enumerate([*KINDS, KINDS[0]]):
        plan = engine.plan(prompt(documents, length, method, 50 + i), method)
        requests.append(engine.submit(plan, SamplingParams(max_tokens=(90, 12, 30, 45, 20, 40)[i], ignore_eos=True)))
        for _ in range(8):
            engine.step()
    engine.cancel(requests[2])
    while engine.step():
        pass
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.token_ids for request in requests]


@pytest.mark.parametrize(
    "family, changes", [("Llama", {}), ("Mistral", {"sliding_window": 150}), ("Gemma2", {"sliding_window": 140})]
)
def test_tables_of_continued_steps_equal_those_made_from_nothing(family, changes):
    model = models.wrap(families.build(family, **changes))
    engine, plain = Engine(model, kv_budget=1 << 26), Engine(model, kv_budget=1 << 26)
    engine.scheduler.runner = checked = Checked(model)
    assert answer(engine) == answer(plain)
    assert checked.continued >= 10 and checked.made > 15


def test_the_last_step_keeps_no_memory():
    engine = Engine(models.wrap(families.build("Llama")), kv_budget=1 << 26)
    engine.scheduler.runner = checked = Checked(engine.model)
    engine.generate(prompt(3, 40, "block"), "block", max_tokens=6, ignore_eos=True)
    assert checked.continued and not checked._decoding[0]._seen
