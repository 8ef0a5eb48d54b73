"""Figures on one NVIDIA GPU, correctness first: an 8B-shaped random Llama in bf16, made on the device; no network, no hub.

    python -m benchmarks.gpu --json gpu.json                  # everything, under 8 minutes on an H100
    python -m benchmarks.gpu --only limits,correct,ttft       # parts
    python -m benchmarks.gpu --only candidates                # beside PyTorch and, if installed, flashinfer-python

Each part writes its figures to the JSON file at once, so an interrupted run still has results. A part that fails is recorded
with its error, and the others continue. Each figure is given with its limit: the bytes to move divided by the copy rate
measured in this run, or the operations divided by the matrix rate measured in this run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_training
from benchmarks.common import LARGE, ids, interleaved, median, model_on
from kvgraph import ContextGraph, Engine, methods, models
from kvgraph.edges import all_pairs, chain
from kvgraph.engine import runner
from kvgraph.engine.loader import THREADS
from kvgraph.train.config import FLEX, SDPA

DEVICE = "cuda"
SMALL = dict(LARGE, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, vocab_size=4096,
             intermediate_size=2816)  # fmt: skip
ONE_B = dict(LARGE, hidden_size=2048, num_hidden_layers=16, num_key_value_heads=8, head_dim=64, intermediate_size=8192,
             tie_word_embeddings=True)  # fmt: skip
DOCUMENTS, LENGTH, QUERY = 32, 1000, 50
Figures = dict[str, Any]


class Bench:
    """The models and limits that parts share; each is made on first use."""

    def __init__(self, quick: bool):
        self.quick = quick
        self.repeats = 3 if quick else 7
        self._made: dict[str, Any] = {}

    def hf(self, shape: str = "8B") -> Any:
        """The Hugging Face model of a shape, bf16, with its own SDPA attention."""
        if shape not in self._made:
            self._made[shape] = random_llama(LARGE if shape == "8B" else ONE_B, torch.bfloat16)
        return self._made[shape]

    def model(self, shape: str = "8B") -> models.Model:
        """The same weights for engines. Wrapped once: that reads all weights, for the fingerprint."""
        if (name := f"{shape} model") not in self._made:
            self._made[name] = model_on(self.hf(shape))
        return self._made[name]

    def engine(self, **options: Any) -> Engine:
        """A new engine on the 8B shape."""
        free()
        return Engine(self.model(), kv_budget=40 << 30, **options)

    def forget(self) -> None:
        """Give back the models' memory; they are made anew when needed."""
        for shape in ("8B", "1B"):
            self._made.pop(shape, None)
            self._made.pop(f"{shape} model", None)
        free()

    @property
    def limits(self) -> Figures:
        if "limits" not in self._made:
            self._made["limits"] = limits(self)
        return self._made["limits"]


def free() -> None:
    """Give back the device memory of what isn't used any more. Engines refer to themselves, so only a search for garbage frees them."""
    gc.collect()
    torch.cuda.empty_cache()


def random_llama(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """A random Llama of a shape, made on the device."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(default)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `run`, after one warm-up; the device is idle before and after."""
    return median(interleaved({"": run}, repeats, DEVICE)[""])


def weight_bytes(hf: Any) -> int:
    """Bytes of weights that one forward reads: all except the embedding, of which it reads only a few rows."""
    embedding = hf.get_input_embeddings().weight
    tied = hf.get_output_embeddings().weight is embedding
    total = sum(p.numel() * p.element_size() for p in hf.parameters())
    return total if tied else total - embedding.numel() * embedding.element_size()


def flops_per_token(hf: Any) -> int:
    """Twice the multiply-adds of the layers' matrices, without the output head, which encoding doesn't run."""
    return 2 * sum(p.numel() for p in hf.model.layers.parameters())


def full_operations(hf: Any, tokens: int) -> int:
    """Operations of a plain prefill: the layers' matrices, and attention, in which half of all pairs of tokens count."""
    config = hf.config
    pairs = tokens * tokens // 2 * config.num_attention_heads * config.head_dim
    return flops_per_token(hf) * tokens + 4 * pairs * config.num_hidden_layers


@contextmanager
def without_graphs() -> Iterator[None]:
    """A block in which steps of any size run kernel by kernel, without CUDA graphs."""
    before, runner.GRAPH_TOKENS = runner.GRAPH_TOKENS, 0
    try:
        yield
    finally:
        runner.GRAPH_TOKENS = before


def profile(run: Callable[[], Any], rows: int = 14) -> list[str]:
    """A profile of `run`: kernels by their total time, and the host's calls by theirs, such as waiting or asking for memory."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    events = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    host = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)[: rows // 2]
    lines = [
        f"wall {wall * 1e3:.2f} ms under the profiler, kernels {total:.2f} ms in {sum(e.count for e in events)} launches"
    ]
    lines += [f"{e.self_device_time_total / 1e3:8.3f} ms  {e.count:6d} x  {e.key[:90]}" for e in events[:rows]]
    return lines + [f"host {e.self_cpu_time_total / 1e3:8.3f} ms  {e.count:6d} x  {e.key[:85]}" for e in host]


# -- parts -----------------------------------------------------------------------------------------------------------


def rates() -> tuple[float, float]:
    """The card's best rates: bf16 matrix products, in operations/s, and copies, in bytes/s read + written."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: [a @ b for _ in range(10)], 5) / 10
    source = torch.randn(1 << 30, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = timed(lambda: [target.copy_(source) for _ in range(5)], 5) / 5
    return 2 * 8192**3 / product, 2 * source.numel() * 2 / copy


def limits(bench: Bench) -> Figures:
    """The card's best rates, of uploads and with the model's own matrices too."""
    matrix, copy = rates()
    pinned = torch.empty(1 << 28, dtype=torch.bfloat16, pin_memory=True)
    target = torch.empty(1 << 28, dtype=torch.bfloat16, device=DEVICE)
    upload = timed(lambda: target.copy_(pinned, non_blocking=True), 5)
    hf = bench.hf()
    x = torch.randn(8192, hf.config.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        layer = hf.model.layers[0]
        mats = [
            layer.self_attn.q_proj,
            layer.self_attn.k_proj,
            layer.self_attn.v_proj,
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
        ]
        dense = timed(lambda: [m(x) for m in mats for _ in range(4)], 5)
    flops = 2 * 8192 * 4 * sum(m.weight.numel() for m in mats)
    return {
        "matrix TFLOP/s": matrix / 1e12,
        "the model's own matrices TFLOP/s": flops / dense / 1e12,
        "device copy TB/s (read + written)": copy / 1e12,
        "pinned upload GB/s": pinned.numel() * 2 / upload / 1e9,
        "weights GB": weight_bytes(hf) / 1e9,
    }


def correct(bench: Bench) -> Figures:
    """The engine against the dense form with transformers' own attention, in bf16, and whether a step waits for the card."""
    return against_dense(torch.bfloat16)


def dtypes(bench: Bench) -> Figures:
    """The same in fp16 and fp32."""
    return {name: against_dense(getattr(torch, name)) for name in ("float16", "float32")}


def against_dense(dtype: torch.dtype) -> Figures:
    """The largest difference of next-token logits from a dense forward, in standard deviations of the latter; cold and warm."""
    graph = ContextGraph([ids(n, n, 4096) for n in (57, 130, 33, 200)], query=ids(11, 1, 4096), prefix=ids(9, 2, 4096))
    edges = ContextGraph(graph.segments, graph.query, graph.prefix, all_pairs(4))
    line = ContextGraph(graph.segments, graph.query, graph.prefix, chain(4))
    plans = {name: methods.get(name).plan(graph) for name in ("full", "block", "pcw", "ape", "epic")}
    plans["graph-kv"] = methods.get("graph-kv").plan(edges)
    plans["graph-kv, 3 rounds"] = methods.get("graph-kv", rounds=3).plan(line)
    engine = Engine(models.wrap(random_llama(SMALL, dtype)), kv_budget=1 << 30)
    found: Figures = {}
    for name, plan in plans.items():
        d = plan.dense()
        groups = {} if d.group is None else {"group": torch.from_numpy(d.group), "groups": d.groups}
        problem = map(torch.from_numpy, (d.tokens, d.positions, d.visible))
        dense = engine.model.dense(*problem, **groups)[-1].float().cpu()
        found[name] = max(float((engine.logits(plan) - dense).abs().max() / dense.std()) for _ in ("cold", "warm"))
    found["steps that waited for the device"] = waits(engine, plans)
    return found


def kernels(bench: Bench) -> Figures:
    """The kernels' own cases in the models' dtype, compiled for this card; most of the time is compilation."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((".", "tests/support"))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".",
             "--noconftest", "-k", "dtype2 or fixed or fused", "tests/support/triton_cases.py", "tests/support/fused_cases.py"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        told = (stopped.stdout or b"").decode(errors="replace")
        return {"stopped after s": stopped.timeout, "pytest": told.strip().splitlines()[-12:]}
    return {"pytest": done.stdout.strip().splitlines()[-12 if done.returncode else -1 :]}


def waits(engine: Engine, plans: dict[str, Any]) -> int:
    """Steps of these plans in which the host waited for the device: cold, warm, and as captured graphs."""
    watching, run = engine.scheduler.runner, engine.scheduler.runner.run
    count = 0

    def watched(rows: Any, want: Any) -> Any:
        nonlocal count
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(rows, want)
        except RuntimeError as error:
            traceback.print_exception(error)
            count += 1
            torch.cuda.set_sync_debug_mode("default")
            return run(rows, want)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    watching.run = watched
    fresh = Engine(engine.model, kv_budget=1 << 30)
    fresh.scheduler.runner = watching
    for plan in plans.values():
        for _ in range(2):
            fresh.logits(plan)
    watching.run = run
    return count


def ttft(bench: Bench) -> Figures:
    """32 documents x 1,000 tokens and a question of 50: full prefill by Hugging Face, and kvgraph with the KV on the device."""
    hf, vocab = bench.hf(), LARGE["vocab_size"]
    graph = ContextGraph([ids(LENGTH, i, vocab) for i in range(DOCUMENTS)], query=ids(QUERY, 999, vocab))
    flat = torch.tensor([[t for s in graph.segments for t in s] + list(graph.query)], device=DEVICE)
    engine = bench.engine()
    started = time.perf_counter()
    engine.encode(graph, "block")
    encode = time.perf_counter() - started
    usages = []

    def warm() -> None:
        result = engine.generate(graph, "block", max_tokens=1)
        assert result.usage.document_tokens_computed == 0
        usages.append(result.usage.ttft)

    @torch.inference_mode()
    def prefill() -> None:
        hf(flat, use_cache=False, logits_to_keep=1).logits[0, -1].argmax().item()

    kvgraph = timed(warm, bench.repeats)
    submitted = median(usages[1:])
    full = timed(prefill, 2)
    with without_graphs():
        eager = timed(warm, bench.repeats)
    kv = DOCUMENTS * LENGTH * engine.model.kv_bytes_per_token
    rate = bench.limits["device copy TB/s (read + written)"] * 1e12
    return {
        "kvgraph warm ms": kvgraph * 1e3,
        "of which from submission ms": submitted * 1e3,
        "kvgraph warm, without CUDA graphs ms": eager * 1e3,
        "Hugging Face full prefill ms": full * 1e3,
        "bytes limit ms": (bench.limits["weights GB"] * 1e9 + kv) / rate * 1e3,
        "operations limit of the full prefill ms": full_operations(hf, flat.shape[1])
        / bench.limits["matrix TFLOP/s"]
        / 1e12
        * 1e3,
        "documents' KV GB": kv / 1e9,
        "first encoding of the documents s": encode,
        **captured(engine),
        "profile": profile(warm),
    }


def captured(engine: Engine) -> Figures:
    """Whether steps run as CUDA graphs, and how many graphs there are."""
    steps: Any = engine.scheduler.runner
    return {"steps run as CUDA graphs": steps._capturable, "CUDA graphs": len(steps._graphs)}


def decode(bench: Bench) -> Figures:
    """Tokens per second at 32k context: one row, and 16 rows on the same documents."""
    vocab, found = LARGE["vocab_size"], {}
    segments = [ids(LENGTH, i, vocab) for i in range(DOCUMENTS)]
    engine = bench.engine()
    steps = 16 if bench.quick else 48
    rate = bench.limits["device copy TB/s (read + written)"] * 1e12
    for rows in (1, 16):
        graphs = [ContextGraph(segments, query=ids(QUERY, 900 + i, vocab)) for i in range(rows)]
        engine.generate(graphs, "block", max_tokens=4, ignore_eos=True)
        times: list[float] = []
        requests = [engine.submit(engine.plan(g, "block"), sampling(steps)) for g in graphs]
        while not all(r.finished for r in requests):
            decoding = all(len(r.token_ids) > 1 for r in requests)
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.step()
            torch.cuda.synchronize()
            if decoding:
                times.append(time.perf_counter() - started)
        found[f"{rows} rows: ms a step"] = median(times) * 1e3
        found[f"{rows} rows: tokens/s"] = rows / median(times)
        if rows == 1:
            found["weights limit ms"] = bench.limits["weights GB"] * 1e9 / rate * 1e3
            found["share of the weight-bandwidth limit"] = found["weights limit ms"] / found["1 rows: ms a step"]
        requests = [engine.submit(engine.plan(g, "block"), sampling(40)) for g in graphs]
        while any(len(r.token_ids) < 8 for r in requests):
            engine.step()
        found[f"{rows} rows: profile of 4 steps"] = profile(lambda: [engine.step() for _ in range(4)])
        found[f"{rows} rows: ms of the host a step"] = host_seconds(engine, 20) * 1e3  # last: it leaves KV out
        for request in requests:
            engine.cancel(request)
    found["16 rows / one row"] = found["16 rows: tokens/s"] / found["1 rows: tokens/s"]
    return found | captured(engine)


def host_seconds(engine: Engine, steps: int) -> float:
    """Median seconds of a decode step without its CUDA graph: the host's work, and one read from a device that is idle."""
    times = []
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", lambda graph: None):
        for _ in range(steps):
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
    return median(times)


def sampling(tokens: int) -> Any:
    from kvgraph.engine.sampling import SamplingParams

    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def encode(bench: Bench) -> Figures:
    """Encoding documents of 500 tokens, compared with the rate of dense matrix products."""
    count, hf, vocab = (64 if bench.quick else 256), bench.hf(), LARGE["vocab_size"]
    engine = bench.engine()
    engine.encode(ContextGraph([ids(500, 7000 + i, vocab) for i in range(16)]), "block")
    graph = ContextGraph([ids(500, i, vocab) for i in range(count)])
    torch.cuda.synchronize()
    started = time.perf_counter()
    engine.encode(graph, "block")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    rate = flops_per_token(hf) * count * 500 / seconds / 1e12
    other = iter(range(10))
    return {
        "documents": count,
        "tokens/s": count * 500 / seconds,
        "TFLOP/s in the layers' matrices": rate,
        "share of the matrix rate": rate / bench.limits["matrix TFLOP/s"],
        "share of the rate of the model's own matrices": rate / bench.limits["the model's own matrices TFLOP/s"],
        "profile of 16 documents": profile(
            lambda: engine.encode(
                ContextGraph([ids(500, 9000 + 100 * i + j, vocab) for i in [next(other)] for j in range(16)]), "block"
            )
        ),
    }


def tiers(bench: Bench) -> Figures:
    """The same request with its KV on the device, in pinned host memory, and on disk.

    Blocking: all copies first, then the step. Share: of the step's time, as with KV on the device, what the copies hide.
    """
    vocab = LARGE["vocab_size"]
    graph = ContextGraph([ids(LENGTH, i, vocab) for i in range(DOCUMENTS)], query=ids(QUERY, 999, vocab))
    with tempfile.TemporaryDirectory() as folder:
        # After each other: two engines' memory wouldn't fit beside the model.
        found = from_host(bench, graph)
        with bench.engine(store=folder) as engine:
            engine.encode(graph, "block")
        try:
            return found | from_disk(bench, graph, folder, found)
        except Exception as error:  # the figures from host memory are there all the same
            traceback.print_exc()
            return found | {"from disk: failed": f"{type(error).__name__}: {error}"[:400]}


def lost(engine: Engine) -> None:
    """Take all records from the device's memory, once nothing is being copied."""
    engine.flush()
    torch.cuda.synchronize()
    engine.scheduler.memory.pool.evict_to(0)


def first_token(engine: Engine, graph: ContextGraph, tier: str) -> float:
    """Seconds to the first token of an answer whose documents are in a tier."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    usage = engine.generate(graph, "block", max_tokens=1).usage
    seconds = time.perf_counter() - started
    assert set(usage.reused_tokens) == {tier} and usage.document_tokens_computed == 0, usage.reused_tokens
    return seconds


def from_host(bench: Bench, graph: ContextGraph) -> Figures:
    """Figures of `tiers` for the device and pinned host memory."""
    times: dict[str, list[float]] = {"device": [], "host": [], "copies": [], "blocking": []}
    with bench.engine(host_budget=16 << 30) as engine:
        engine.encode(graph, "block")
        pool, pooling, host = engine.scheduler.memory.pool, engine.scheduler.pooling, engine.host
        assert host is not None
        keys = [key for key in engine.keys(engine.plan(graph, "block")) if key is not None]
        first_token(engine, graph, "memory")
        for _ in range(bench.repeats + 1):
            times["device"].append(first_token(engine, graph, "memory"))
            lost(engine)
            times["host"].append(first_token(engine, graph, "host"))
            lost(engine)
            sources = [got[0] for got in map(host.get, keys) if got is not None]
            torch.cuda.synchronize()
            started = time.perf_counter()
            records = [pooling.bring(record) for record in sources]
            pooling.begin()
            torch.cuda.synchronize()
            times["copies"].append(time.perf_counter() - started)
            for record in records:
                pool.put(record)
            times["blocking"].append(times["copies"][-1] + first_token(engine, graph, "memory"))
            del sources, records
        nbytes = host.size()
    step, took, copies, blocking = (median(times[name][1:]) for name in ("device", "host", "copies", "blocking"))
    kv = len(keys) * LENGTH * 131072
    upload = kv / bench.limits["pinned upload GB/s"] / 1e9
    return {
        "documents' KV GB": kv / 1e9,
        "pinned memory taken GB": nbytes / 1e9,
        "on the device ms": step * 1e3,
        "upload of its bytes, one large copy ms": upload * 1e3,
        "the copies alone ms": copies * 1e3,
        "from pinned host memory ms": took * 1e3,
        "from pinned host memory / upload": took / upload,
        "blocking ms": blocking * 1e3,
        "share of the step that the copies hide": (copies + step - took) / step,
        "from pinned host memory, every time ms": [round(t * 1e3, 1) for t in times["host"]],
    }


def from_disk(bench: Bench, graph: ContextGraph, folder: str, others: Figures) -> Figures:
    """Figures of `tiers` for a folder whose files are in the page cache."""
    first, again = [], []
    for _ in range(2):
        with bench.engine(store=folder) as engine:
            first.append(first_token(engine, graph, "disk"))
            for _ in range(2 if bench.quick else 3):
                lost(engine)
                again.append(first_token(engine, graph, "disk"))
    with bench.engine(store=folder) as engine:  # the reading alone, with the engine's own threads
        keys = [key for key in engine.keys(engine.plan(graph, "block")) if key is not None]
        with ThreadPoolExecutor(THREADS) as threads:
            seconds = []
            for _ in range(2):  # the first time checks the records
                started = time.perf_counter()
                for done in threads.map(lambda key: engine._fetch(key, "") is not None, keys):
                    assert done
                seconds.append(time.perf_counter() - started)
    step, copies = others["on the device ms"], others["the copies alone ms"]
    return {
        "from disk, page cache warm, checked ms": median(first[1:]) * 1e3,
        "from disk, page cache warm, the first time in a process ms": first[0] * 1e3,
        "from disk, page cache warm, again ms": median(again) * 1e3,
        "reading alone, again ms": seconds[1] * 1e3,
        "share of copies and step that reading hides": (seconds[1] * 1e3 + copies + step - median(again) * 1e3)
        / (copies + step),
        "from disk, again, every time ms": [round(t * 1e3, 1) for t in again],
    }


def arrivals(bench: Bench) -> Figures:
    """The same plan cold, and with its KV on the device, in host memory and on disk: are the logits equal, bit by bit?

    Steps run kernel by kernel. Memory is small, so that records come and go; requests are cancelled in between. Cold answers may differ in
    the last bits, as documents and question share steps of other sizes; how much is in standard deviations.
    """
    vocab, found = SMALL["vocab_size"], Counter[str]()
    model = models.wrap(random_llama(SMALL, torch.bfloat16))
    graphs = [
        ContextGraph([ids(200 + 13 * i, 50 * seed + i, vocab) for i in range(8)], query=ids(9, seed, vocab))
        for seed in range(6)
    ]
    graphs += [ContextGraph([ids(12, 900 + i, vocab) for i in range(40)], query=ids(9, 7, vocab))]  # short: gathered
    budget = 6000 * model.kv_bytes_per_token  # two or three of the seven
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder, without_graphs():
        with Engine(model, store=folder, kv_budget=4 << 30) as engine:
            plans = [engine.plan(graph, "block") for graph in graphs]
            cold = [engine.logits(plan) for plan in plans]
            warm = [engine.logits(plan) for plan in plans]
            apart = max(float((a - b).abs().max() / b.std()) for a, b in zip(cold, warm, strict=True))
            engine.flush()
        with (
            Engine(model, store=folder, kv_budget=budget) as disk,
            Engine(model, store=folder, kv_budget=budget, host_budget=2 << 30) as host,
        ):
            steps = [watched_steps(engine) for engine in (disk, host)]
            for round_ in range(4 if bench.quick else 12):
                for number, plan in enumerate(plans):
                    for engine in (disk, host):
                        given_up = engine.submit(plans[(number + 3) % len(plans)])
                        if round_ % 2:  # by then, some of its records are on their way
                            engine.step()
                        engine.cancel(given_up)
                        result = engine.wait(engine.submit(plan, sampling(1), first_logits=True))
                        assert result.first_logits is not None
                        equal = torch.equal(result.first_logits, warm[number])
                        for tier in result.usage.reused_tokens:
                            found[f"answers that read {tier}"] += 1
                            found[f"of them, not equal ({tier})"] += not equal
                        found["documents' tokens computed"] += result.usage.document_tokens_computed
            found["steps that waited for the device"] = sum(map(len, steps))
    return {"cold / warm, largest difference": apart, **found}


def watched_steps(engine: Engine) -> list[str]:
    """Has an engine note the errors of steps in which the host would wait for the device."""
    run, waited = engine.scheduler.runner.run, []

    def watched(rows: Any, want: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(rows, want)
        except RuntimeError as error:
            traceback.print_exception(error)
            waited.append(str(error))
            torch.cuda.set_sync_debug_mode("default")
            return run(rows, want)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.scheduler.runner.run = watched  # type: ignore[method-assign]
    return waited


def cold(model: Any, graph: ContextGraph, method: Any) -> float:
    """Seconds to the first token of a plan with nothing stored; the better of two runs after a warm-up."""
    times = []
    for _ in range(3):
        engine = None  # the one before
        free()
        engine = Engine(model, kv_budget=20 << 30)
        plan = engine.plan(graph, method)
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.logits(plan)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def flat(tokens: int) -> ContextGraph:
    """A plain prompt of a given number of tokens."""
    vocab = LARGE["vocab_size"]
    return ContextGraph([], query=ids(9, 5, vocab), prefix=[ids(tokens - 9, 3, vocab)])


def levels(bench: Bench) -> Figures:
    """Cold rounds of graph-kv over 200 chunks of 100 tokens, against one flat prefill of the same number of tokens (1B shape)."""
    model, vocab, method = bench.model("1B"), LARGE["vocab_size"], methods.get("graph-kv", rounds=2)
    edges = [(a, b) for b in range(200) for a in range(max(0, b - 2), b)]
    graph = ContextGraph([ids(100, i, vocab) for i in range(200)], ids(9, 5, vocab), edges=edges)
    tokens = sum(map(len, method.plan(graph).spans))
    many, one = cold(model, graph, method), cold(model, flat(tokens), "full")
    return {"graph-kv ms": many * 1e3, "flat prefill ms": one * 1e3, "graph-kv / flat": many / one, "tokens": tokens}


def messages(bench: Bench) -> Figures:
    """Cold chats of many short messages, against one message with the same number of tokens (1B shape)."""
    model, vocab, found = bench.model("1B"), LARGE["vocab_size"], {}
    for count, length in ((41, 22), (301, 10)) if bench.quick else ((41, 22), (1001, 10)):
        chat = ContextGraph([], query=ids(9, 5, vocab), prefix=[ids(length, i, vocab) for i in range(count)])
        many, one = cold(model, chat, "full"), cold(model, flat(count * length + 9), "full")
        found |= {f"{count} messages ms": many * 1e3, f"{count} messages / one message": many / one}
    return found


def hugging_face(bench: Bench) -> Figures:
    """Decoding by Hugging Face at 32k context, with a dynamic cache."""
    hf, vocab = bench.hf(), LARGE["vocab_size"]
    cache, times = DynamicCache(), []
    with torch.inference_mode():
        for part in torch.tensor([ids(DOCUMENTS * LENGTH, 1, vocab)], device=DEVICE).split(8000, 1):
            step = hf(part, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for _ in range(12):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step = hf(step, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return {"ms a token": median(times[2:]) * 1e3}


def compiled(bench: Bench) -> Figures:
    """Hugging Face's `generate` at 32k context with a static cache and a compiled forward."""
    hf, vocab, times = bench.hf(), LARGE["vocab_size"], []
    tokens = torch.tensor([ids(DOCUMENTS * LENGTH, 1, vocab)], device=DEVICE)
    for new in (40, 8, 40):
        torch.cuda.synchronize()
        started = time.perf_counter()
        hf.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation="static")
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"ms a token": (times[2] - times[1]) / 32 * 1e3, "first call, with compilation s": times[0]}


def training(bench: Bench) -> Figures:
    """Training steps of an adapter of a 135M model, with SDPA."""
    bench.forget()
    return gpu_training.figures(SDPA, DEVICE, 6 if bench.quick else 10, profile)


def training_flex(bench: Bench) -> Figures:
    """The same with FlexAttention, which takes more than a minute to compile."""
    bench.forget()
    return gpu_training.figures(FLEX, DEVICE, 6 if bench.quick else 10, profile)


def candidates(bench: Bench) -> Figures:
    """Attention of one layer by kvgraph's kernels, PyTorch and FlashInfer, on the same inputs."""
    from benchmarks import gpu_candidates

    matrix, copy = rates()
    found = {"matrix TFLOP/s": matrix / 1e12, "device copy TB/s (read + written)": copy / 1e12}
    return found | gpu_candidates.compare(matrix, copy, 10 if bench.quick else 30)


PARTS: dict[str, Callable[[Bench], Figures]] = {
    "limits": lambda bench: bench.limits,
    "correct": correct,
    "arrivals": arrivals,
    "ttft": ttft,
    "decode": decode,
    "encode": encode,
    "hugging_face": hugging_face,
    "levels": levels,
    "messages": messages,
    "tiers": tiers,
    "dtypes": dtypes,
    "compiled": compiled,
    "kernels": kernels,
    "training": training,
    "training_flex": training_flex,
    "candidates": candidates,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here, after every part")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, by commas [default: all]")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and documents")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs an NVIDIA GPU; torch sees none here")
    if unknown := set(args.only.split(",")) - set(PARTS):
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: Figures = {
        "environment": {
            "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]), "card": torch.cuda.get_device_name(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        }
    }  # fmt: skip
    bench = Bench(args.quick)
    for name in args.only.split(","):
        started = time.perf_counter()
        try:
            found[name] = PARTS[name](bench)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}
        found[name]["part's seconds"] = time.perf_counter() - started
        print(f"== {name}", json.dumps(found[name], indent=1), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        free()  # it fails if the part broke the device's context, and then so would every other part


if __name__ == "__main__":
    main()
