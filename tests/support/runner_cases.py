"""The GPU's way to run steps, without a GPU: kernels in Triton's interpreter, and CUDA graphs replaced by calls that are
made again. Run by test_triton.py in a process of its own. What it shows: tables of fixed sizes serve step after step, and
answers equal those of the plain runner."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

import families
from kvgraph import ContextGraph, Engine, models
from kvgraph.edges import all_pairs, chain
from kvgraph.engine import runner as runners
from kvgraph.engine import transfers
from soak import SOAK
from streams import Late

replays = 0


class Graph:
    """A CUDA graph's interface: what ran inside `graph` runs again, into the same output."""

    def pool(self):
        return "pool"

    def replay(self):
        global replays
        replays += 1
        self.output.copy_(self.forward())


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    recorded = {}

    @contextmanager
    def graph(made, pool=None, capture_error_mode=None):
        recorded["graph"] = made
        yield

    forward = models.adapter.Model.forward

    def watched(self, tokens, positions, attend, want):
        output = forward(self, tokens, positions, attend, want)
        if "graph" in recorded:
            made = recorded.pop("graph")
            made.output, made.forward = output, lambda: forward(self, tokens, positions, fresh(attend), want)
        return output

    def fresh(attend):  # a captured graph computes its tables of angles again, from the shifts of the step
        attend._angles.clear()
        return attend

    monkeypatch.setattr(models.adapter.Model, "forward", watched)
    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("most", [32, 0], ids=["graphs", "no graphs"])
def test_answers_are_those_of_the_plain_runner(monkeypatch, most):
    global replays
    replays = 0
    layers = 1 if most and not SOAK else 2
    shape = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}  # the interpreter is slow
    model = models.wrap(families.build("Llama", **shape))
    monkeypatch.setattr(runners, "GRAPH_TOKENS", most)
    plain, cuda = Engine(model, kv_budget=1 << 26), Engine(model, kv_budget=1 << 26)
    cuda.scheduler.runner = runners.CudaRunner(model)
    graphs = [
        (ContextGraph([[5, 6, 7], [9, 8], [11, 12, 13, 14]], [3, 4], [2, 1], all_pairs(3)), "graph-kv"),
        (ContextGraph([[5, 6, 7], [9, 8], [11, 12, 13, 14]], [3], [2, 1], chain(3)), "graph-kv"),
        (ContextGraph([[5, 6, 7], [9, 8]], [3, 4, 5], [2, 1]), "ape"),
        (ContextGraph([[5, 6, 7, 9, 10], [9, 8]], [3, 4, 5], [2, 1]), "epic"),
        (ContextGraph([[5, 6, 7], [9, 8]], [3, 4, 5], [2, 1]), "full"),
    ]
    tokens = 4 if most else 2  # with graphs, the last steps bring the tables of those before them up to date
    if not SOAK:
        graphs = graphs[1:2] if most else graphs[2:3]
    for graph, method in graphs:
        for _ in range(2):  # cold, then warm
            a, b = (
                e.generate(graph, method, max_tokens=tokens, ignore_eos=True, first_logits=True) for e in (plain, cuda)
            )
            torch.testing.assert_close(b.first_logits, a.first_logits, atol=1e-4, rtol=0)
            assert a.token_ids == b.token_ids
    if most or SOAK:
        batch = [ContextGraph([[5, 6, 7], [9, 8]], [3, 4, i]) for i in range(3)]
        a, b = (e.generate(batch, "block", max_tokens=tokens, ignore_eos=True) for e in (plain, cuda))
        assert [r.token_ids for r in a] == [r.token_ids for r in b]
    assert (replays > 4) == bool(most)
    assert (cuda.scheduler.runner._decoding is not None) == bool(most)


def test_layers_wait_for_their_own_part_of_what_arrives(monkeypatch, tmp_path):
    """Steps that read what is arriving run kernel by kernel; those after it are graphs again."""
    global replays
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = models.wrap(families.build("Llama", **shape))
    monkeypatch.setattr(runners, "GRAPH_TOKENS", 32)
    monkeypatch.setattr(transfers, "LEAST", 1)
    graph = ContextGraph([[5, 6, 7], [9, 8]], [3])
    with Engine(model, store=tmp_path, kv_budget=1 << 26) as engine:
        plain = [engine.generate(graph, "block", max_tokens=2, ignore_eos=True, first_logits=True) for _ in range(2)][1]
    with Engine(model, store=tmp_path, kv_budget=1 << 26) as engine:
        engine.loader.close()  # reads at once: all that comes, comes together
        engine.scheduler.runner = runners.CudaRunner(model)
        pooling, late = engine.scheduler.pooling, Late()
        pooling.transfers = transfers.Transfers(model.device, pooling._shapes, late, Late())
        replays, steps = 0, []
        run = engine.scheduler.runner.run

        def watched(rows, want):
            logits = run(rows, want)
            steps.append((replays, [mark.waits for mark in late.marks]))
            return logits

        engine.scheduler.runner.run = watched
        found = engine.generate(graph, "block", max_tokens=2, ignore_eos=True, first_logits=True)
    assert steps == [(0, [1, 1]), (1, [1, 1])]
    torch.testing.assert_close(found.first_logits, plain.first_logits, atol=1e-4, rtol=0)
    assert found.token_ids == plain.token_ids


def test_a_16_bit_model_runs_with_fused_kernels(monkeypatch):
    monkeypatch.setattr(runners, "GRAPH_TOKENS", 0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = models.wrap(families.build("Qwen3", **shape).half())
    plain, cuda = Engine(model, kv_budget=1 << 26), Engine(model, kv_budget=1 << 26)
    cuda.scheduler.runner = runner = runners.CudaRunner(model)
    assert len(runner._fused.forwards) == 4 + 1 + 1 + 1  # norms, a gate, attention, and the last norm
    plan = plain.plan(ContextGraph([[5, 6, 7], [9, 8]], [3, 4, 5], [2, 1]), "block")
    expected = plain.logits(plan)
    torch.testing.assert_close(cuda.logits(plan), expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
