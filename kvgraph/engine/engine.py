"""The engine: executes any plan, on one model, with one pool of KV and one store behind it.

It knows nothing about methods or text, except that it turns a graph into a plan with the method's own function. The
loop is `submit -> step -> step -> ... -> result`; `run` keeps several requests in it, and `generate`, `stream`, `encode`
and `score` are built on these.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby, product
from pathlib import Path
from typing import Any, overload

import psutil
import torch
from torch import Tensor

from kvgraph import methods, models
from kvgraph.attention.backends import cpu
from kvgraph.attention.rows import SHORT
from kvgraph.checks import gate
from kvgraph.engine.detokenize import TextStream
from kvgraph.engine.loader import Loader
from kvgraph.engine.probe import cost, probed
from kvgraph.engine.request import UNCACHED, Request, link_of
from kvgraph.engine.request import Sequence as TokenSequence
from kvgraph.engine.result import Chunk, Result, Usage
from kvgraph.engine.retrieval_heads import retrieval_scores
from kvgraph.engine.sampling import Sampler, SamplingError, SamplingParams
from kvgraph.engine.scheduler import PAIRS, Scheduler
from kvgraph.engine.scratch import scratch_bytes
from kvgraph.errors import CapacityError, GraphError, KVGraphError, StoreError
from kvgraph.graph import ContextGraph, check_text
from kvgraph.methods import Method
from kvgraph.plan import Plan
from kvgraph.progress import Progress
from kvgraph.store.base import Found, Store
from kvgraph.store.codecs.base import Codec
from kvgraph.store.codecs.registry import fingerprint_with, packed, parse
from kvgraph.store.disk.store import DiskStore
from kvgraph.store.memory import HostStore
from kvgraph.store.open import Where, open_store
from kvgraph.store.record import Record
from kvgraph.store.selection.base import ByLayer, Selection, selected
from kvgraph.store.selection.registry import fingerprint_selected, parse_selection

log = logging.getLogger("kvgraph.engine")

BEFORE = 8  # tokens of a prompt that its continuation is decoded with
WRITES = 64  # records that may wait to be written; beyond this, encoding waits for the disk
WAITING = 1 << 30  # bytes of them; memory's budget doesn't count what it gave up and isn't written yet
BATCH = 64 << 20  # bytes of records that are handed to the store together
PATIENCE = 0.01  # seconds that a step waits for the store when nothing else can run; then others may have the lock
PINS = ("cuda",)  # devices that copy from pinned host memory
IN_FLIGHT = 128  # requests that `run` keeps in the engine at once


@dataclass
class Encoded:
    """What `Engine.encode` did. Tokens and bytes count the spans that queries over these graphs will read."""

    graphs: int = 0
    computed_tokens: int = 0
    reused_tokens: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0
    seconds: float = 0.0

    def add(self, usage: Usage) -> None:
        """Count one more request."""
        self.computed_tokens += usage.computed_tokens
        self.kv_bytes += usage.kv_bytes
        for tier, n in usage.reused_tokens.items():
            self.reused_tokens[tier] = self.reused_tokens.get(tier, 0) + n


class Engine:
    """Runs plans. Safe to use from several threads: whoever waits drives the steps for everyone.

    store: where records outlive the process: a folder, a URL (redis://, s3://, ...), several of them from fastest to
    slowest, or a store; None keeps them in memory only. kv_budget: bytes of KV held at once, all
    requests and cached spans together (default: half of the free memory, or 80 % of the free GPU memory).
    max_step_tokens: tokens of one packed forward. salt: separates tenants; it is part of every key. codec: how records are
    kept, as text such as "kivi:bits=2" (see `kvgraph.store.codecs.registry`). What a lossy one loses is lost before a
    span's first use, so answers don't depend on where a record came from; its records have keys of their own. select:
    which tokens of a span are kept, as text such as "snapkv:keep=50" (see `kvgraph.store.selection.registry`); None: all.
    host_budget: bytes of pinned host memory in which a GPU's engine keeps copies of its records, the least recently used of
    which go first. What the GPU's memory lost comes back from there in about the time of the copy. 0: none are kept.
    """

    def __init__(
        self,
        model: models.Model,
        *,
        store: Store | Where | Sequence[Where] | None = None,
        kv_budget: int | None = None,
        host_budget: int = 0,
        max_step_tokens: int | None = None,
        salt: str = "",
        codec: str | Codec = "raw",
        select: str | Selection | None = None,
    ):
        for name, value in (("kv_budget", kv_budget), ("max_step_tokens", max_step_tokens)):
            if value is not None and not (isinstance(value, int) and value > 0):
                raise KVGraphError(f"{name} must be a positive integer, not {value!r}")
        if not (isinstance(host_budget, int) and host_budget >= 0):
            raise KVGraphError(f"host_budget must be a number of bytes, not {host_budget!r}")
        if host_budget and model.device.type not in PINS:
            raise KVGraphError(
                f"host_budget is for GPUs; on device {model.device.type}, give a larger kv_budget instead"
            )
        if not isinstance(codec, str) and not hasattr(codec, "pack"):
            raise KVGraphError(f"codec must be a name or a codec, not {type(codec).__name__}")
        if not isinstance(salt, str):
            raise KVGraphError(f"salt must be text, not {type(salt).__name__}")
        if store is not None and not isinstance(store, str | Path | Sequence) and not hasattr(store, "get"):
            raise KVGraphError(f"store must be a folder, a URL, a list of them, or a store, not {type(store).__name__}")
        self.model, self.salt = model, salt
        self.codec = parse(codec) if isinstance(codec, str) else codec
        selection = parse_selection(select) if isinstance(select, str) else select
        self.selection = None if selection is None or selection.keep == 100 else selection
        if self.selection is not None:
            _check_selectable(model, self.selection)
            if isinstance(self.selection, ByLayer):
                self.selection = self.selection.fitted(retrieval_scores(model))
        self.fingerprint = fingerprint_selected(fingerprint_with(model.fingerprint, self.codec), self.selection)
        if isinstance(store, str | Path | Sequence):
            store = open_store(store, self.fingerprint)
        self.store = store
        self._stores: dict[str, Store] = {} if store is None else {"": store}  # by tenant, see `_store_of`
        self.stored_bytes = 0  # of KV that were handed to the store, as it keeps them
        self.store_errors = 0
        self.store_error: StoreError | None = None  # the first one
        step_tokens = max_step_tokens or (512 if model.device.type == "cpu" else 8192)
        self.loader = None if self.store is None else Loader(self._fetch)
        self.host = HostStore(host_budget) if host_budget else None
        self.scheduler = Scheduler(
            model,
            kv_budget or default_budget(model.device, scratch_bytes(model, step_tokens, PAIRS * step_tokens)),
            step_tokens,
            self.loader,
            self._save,
            None if self.codec.lossless and self.selection is None else self._settle,
            self.selection,
            self.codec,
            self.host,
        )
        if self.scheduler.pooling.transfers is not None:
            _read_into(() if self.store is None else self.store.tiers, self.scheduler.pooling.transfers.bytes)
        self._lock = threading.RLock()
        self._uncached = count()
        self._warned: set[str] = set()
        kept = self.store is not None or self.host is not None
        self._writer = ThreadPoolExecutor(1, "kvgraph-writer") if kept else None
        self._writes: list[tuple[Future[None], int]] = []  # when done, a record is written; its bytes
        self._pending: deque[tuple[str, Record | list[str]]] = (
            deque()
        )  # (salt, record to keep or keys to remove), in order

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        device: str = "cpu",
        allow_untested: bool = False,
        check: bool = True,
        store: Store | Where | Sequence[Where] | None = None,
        kv_budget: int | None = None,
        host_budget: int = 0,
        max_step_tokens: int | None = None,
        salt: str = "",
        codec: str | Codec = "raw",
        select: str | Selection | None = None,
    ) -> Engine:
        """Load a Hugging Face causal LM from a folder, hub name or GGUF file, run the gate, and return an engine on it.

        adapter: a LoRA adapter in PEFT's format to merge into it. A folder with an adapter alone stands for its base with it.
        quantize: "int8" or "int4" for the model's matrices, on a CPU, with records of their own; None leaves them as they are.
        check=False skips the gate (`kvgraph check`), which refuses a model whose composed logits differ from a plain
        forward. For the other arguments see Engine. Raises ModelError with the reason.
        """
        # What is wrong with these is said before the model takes its time.
        codec = parse(codec) if isinstance(codec, str) else codec
        select = parse_selection(select) if isinstance(select, str) else select
        loaded = load_model(
            model,
            adapter=adapter,
            dtype=dtype,
            quantize=quantize,
            device=device,
            allow_untested=allow_untested,
            check=check,
        )
        return cls(
            loaded,
            store=store,
            kv_budget=kv_budget,
            host_budget=host_budget,
            max_step_tokens=max_step_tokens,
            salt=salt,
            codec=codec,
            select=select,
        )

    # -- graphs -------------------------------------------------------------------------------------------------------

    def plan(self, graph: ContextGraph, method: str | Method | None = None, *, probe: bool = True) -> Plan:
        """The plan of a graph. Text is tokenized piece by piece with the model's tokenizer, then the method plans.

        method: as text ("epic:k=8") or an instance; None is the model's default (see kvgraph.methods.resolve).
        probe: if the method depends on the model (cacheblend), run the model's first layer to get what it needs. With
            False it recomputes nothing, which is right for encoding documents.

        Raises GraphError or PlanError; with `probe` also for a prompt that is too long for the model, and before a probe
        whatever `prepare` would raise for the plan without it.
        """
        if not isinstance(graph, ContextGraph):
            raise GraphError(f"give a ContextGraph (or a list of them), not {type(graph).__name__}")
        method = methods.resolve(method, self.model.tuned_for)
        if not graph.is_tokenized:
            graph = graph.tokenized(self.tokenize)
        self._warn_untuned(method)
        if probe and not method.shares_positions:  # a too long prompt isn't planned; who encodes says which document is
            pieces = [*graph.prefix, *(graph.segments[i] for i in graph.read), graph.query]
            self.scheduler.check_position(sum(map(len, pieces)) - 1)
        if not method.needs_probe:
            return method.plan(graph)
        plain = method.selecting([]).plan(graph)
        if not probe:
            return plain
        self.prepare(plain, SamplingParams(max_tokens=1))  # a selection only adds to what a plan needs
        return self._probed(graph, method)

    def _probed(self, graph: ContextGraph, method: Method) -> Plan:
        """The plan of a method that must run the model to make it. The graph was checked."""
        return probed(self.model, graph, method, self.scheduler.max_step_tokens)

    @overload
    def generate(
        self,
        graph: ContextGraph,
        method: str | Method | None = ...,
        params: SamplingParams | None = ...,
        *,
        first_logits: bool = ...,
        **sampling: Any,
    ) -> Result: ...

    @overload
    def generate(
        self,
        graph: Sequence[ContextGraph],
        method: str | Method | None = ...,
        params: SamplingParams | None = ...,
        *,
        first_logits: bool = ...,
        **sampling: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        graph: ContextGraph | Sequence[ContextGraph],
        method: str | Method | None = None,
        params: SamplingParams | None = None,
        *,
        first_logits: bool = False,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Answer a graph (-> Result) or several at once (-> list of Result, batched together).

        params or its fields as keywords (max_tokens=…, temperature=…). first_logits keeps the logits of the first step.
        """
        graphs = list(graph) if isinstance(graph, Sequence) else [graph]
        params = params_of(params, sampling)
        requests = [self.prepare(self.plan(g, method), params, first_logits=first_logits) for g in graphs]
        results = dict(self._results(requests))
        return [results[i] for i in range(len(graphs))] if isinstance(graph, Sequence) else results[0]

    def stream(
        self,
        graph: ContextGraph,
        method: str | Method | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Answer a graph piece by piece; the last chunk carries the Result. The request starts with the first `next`.

        Closing the iterator cancels it.
        """
        yield from self.chunks(self.submit(self.plan(graph, method), params_of(params, sampling)))

    def encode(
        self,
        graph: ContextGraph | Sequence[ContextGraph],
        method: str | Method | None = None,
        *,
        progress: bool | None = None,
    ) -> Encoded:
        """Encode everything that queries over these graphs will read into the pool and the store. No query is needed.

        progress: show a bar (default: on a terminal, for several graphs). Returns totals.
        """
        graphs = list(graph) if isinstance(graph, Sequence) else [graph]
        started, total = time.perf_counter(), Encoded(graphs=len(graphs))
        with Progress("encoding", len(graphs), enabled=progress) as bar:
            for _, result in self._results(self.prepare_encoding(g, method) for g in graphs):
                total.add(result.usage)
                bar.advance(1, tokens=total.computed_tokens)
        self.flush()
        total.seconds = time.perf_counter() - started
        return total

    def score(self, graph: ContextGraph, answer: str | Sequence[int], method: str | Method | None = None) -> Result:
        """Log-probabilities of a given answer after the graph's query: Result.scores, one per token of the answer."""
        return self.wait(self._enqueued(self.prepare_score(graph, answer, method)))

    def scores(self, graph: ContextGraph, answer: str | Sequence[int], method: str | Method | None = None) -> Tensor:
        """Only the scores of `score`: [n] float32."""
        return self.score(graph, answer, method).scores

    # -- requests -----------------------------------------------------------------------------------------------------

    def run(
        self, requests: Iterable[Request | KVGraphError], *, in_flight: int = IN_FLIGHT
    ) -> Generator[tuple[int, Result | KVGraphError]]:
        """Answer prepared requests, `in_flight` of them at once: (i, outcome of request i), in the order they end.

        A request is taken from the iterable when there is room for it. An error that a user can cause ends one request
        and is its outcome. An error in place of a request, which couldn't be prepared, is its outcome too. Any other
        error is raised. Then, and when the iterator is closed, all requests in the engine are cancelled.
        """
        pending: dict[Request, int] = {}
        with self._all_or_none(pending):
            for i, request in enumerate(requests):
                if isinstance(request, KVGraphError):
                    yield i, request
                    continue
                pending[self._enqueued(request)] = i
                while len(pending) >= in_flight:
                    yield from self._finished(pending)
            while pending:
                yield from self._finished(pending)

    def prepare_encoding(self, graph: ContextGraph, method: str | Method | None = None) -> Request:
        """A request that encodes everything queries over this graph will read. For errors see `plan` and `prepare`."""
        graph = graph if graph.has_query else graph.with_query([0])  # the query changes no document
        return self.prepare(self.plan(graph, method, probe=False), encode_only=True)

    def prepare_score(
        self, graph: ContextGraph, answer: str | Sequence[int], method: str | Method | None = None
    ) -> Request:
        """A request that scores an answer, as `score` does. For errors see `plan` and `prepare`."""
        if not graph.is_tokenized:
            graph = graph.tokenized(self.tokenize)
        ids = self.tokenize(answer) if isinstance(answer, str) else list(answer)
        if not ids or not graph.has_query:
            raise GraphError("scoring needs a query and an answer of at least one token each")
        plan = self.plan(graph.with_query([*graph.query, *ids[:-1]]), method)
        return self.prepare(plan, SamplingParams(max_tokens=1), answer=ids)

    # -- plans --------------------------------------------------------------------------------------------------------

    def submit(self, plan: Plan, params: SamplingParams | None = None, **options: Any) -> Request:
        """Queue a plan; drive it with `wait`, `chunks` or `step`. For arguments and errors see `prepare`."""
        return self._enqueued(self.prepare(plan, params, **options))

    def prepare(
        self,
        plan: Plan,
        params: SamplingParams | None = None,
        *,
        first_logits: bool = False,
        encode_only: bool = False,
        answer: Sequence[int] = (),
        salt: str | None = None,
        proceed: bool = False,
        echo: bool = False,
        shown: Collection[int] = (),
        answer_logprobs: bool = False,
    ) -> Request:
        """A request that is ready for `enqueue`: what it takes to hash a plan happens here, without any lock.

        encode_only: stop when every cached span is encoded. answer: score these tokens instead of decoding; all but the
        last of them end the plan's prompt span. salt: another tenant's than the engine's. proceed: the text follows the
        prompt's without a break (see `TextStream`). echo: score the prompt span too; Request.scored has its tokens from the
        second on, with log-probabilities if they are asked for. answer_logprobs: keep the whole distribution at every token
        of `answer`. shown: special tokens that the text has. Raises PlanError or CapacityError if the request could never run,
        and GrammarError.
        """
        params = params or SamplingParams()
        self.scheduler.check(plan)  # before the hashes, which take long for a plan that is too long
        keys = self.keys(plan, salt)
        pool_keys = [k if k is not None else f"{UNCACHED}{next(self._uncached)}" for k in keys[:-1]]
        live = plan.prompt
        new = min(params.max_tokens, self.model.limit - live.positions[-1])
        own = 0 if encode_only else len(live)
        usage = Usage(sum((p.hi or 0) - p.lo for p in live.sees) + own, computed_tokens=own, live_tokens=own)
        usage.probe_tokens, usage.probe = cost(plan)
        ends = frozenset((*params.stop_token_ids, *self.model.eos_ids))
        link = link_of(plan, pool_keys, len(plan.spans) - 1)
        request = Request(
            plan=plan,
            keys=pool_keys,
            params=params,
            ends=frozenset(params.stop_token_ids) if params.ignore_eos else ends,
            sampler=Sampler(params, prompt_tokens(plan), ends),
            stream=TextStream(
                partial(self.detokenize, shown=shown),
                params.stop,
                params.min_tokens,
                live.tokens[-BEFORE:] if proceed else (),
            ),
            sequence=TokenSequence(live, pool_keys, max(0, new - 1), linked=bool(link) and len(live) > SHORT),
            encode_only=encode_only,
            answer=live.tokens[1:] if echo else tuple(answer),
            echo=echo,
            keep_logits=first_logits,
            keep_answer=answer_logprobs,
            submitted=time.perf_counter() - usage.probe,
            usage=usage,
            guide=None if params.grammar is None else self.scheduler.guides.guide(params.grammar),
            link=link,
            salt=self.salt if salt is None else salt,
        )
        self.scheduler.memory.check(request)
        return request

    def keys(self, plan: Plan, salt: str | None = None) -> list[str | None]:
        """The key of every span of a plan, None for spans that are never stored. salt: see `prepare`."""
        return plan.keys(self.fingerprint, self.salt if salt is None else salt)

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request, once."""
        with self._lock:
            self.scheduler.submit(request)

    def step(self) -> bool:
        """Run one packed forward for the waiting requests. Returns False if there was nothing to do."""
        with self._lock:
            if self.scheduler.idle:
                return False
            ran = self.scheduler.step()
        self._await_store(ran)
        return True

    def wait(self, request: Request) -> Result:
        """Drive steps until a request is finished. Raises the error that ended it, if any."""
        with self._all_or_none([request]):
            while not request.finished:
                self._advance(request)
        if request.error is not None:
            raise request.error
        assert request.result is not None
        return request.result

    def chunks(self, request: Request) -> Iterator[Chunk]:
        """The pieces of a submitted request as they come."""
        try:
            while True:
                self._advance(request)
                with self._lock:  # read both at once: other threads may drive the request meanwhile
                    fresh, request.fresh = request.fresh, []
                    finished, result, error = request.finished, request.result, request.error
                if error is not None:
                    raise error
                if fresh or finished:
                    yield Chunk("".join(t for t, _ in fresh), [t for _, t in fresh if t >= 0], result)
                if finished:
                    return
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """End a request now and free what it held; no effect on a finished one."""
        with self._lock:
            self.scheduler.cancel(request)

    def logits(self, plan: Plan) -> Tensor:
        """Next-token logits [V] float32 after a plan's prompt span."""
        result = self.wait(self.submit(plan, SamplingParams(max_tokens=1, ignore_eos=True), first_logits=True))
        assert result.first_logits is not None
        return result.first_logits

    # -- text ---------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of one piece of text, no special tokens added."""
        if self.model.tokenizer is None:
            raise GraphError("this model has no tokenizer; give token ids instead of text")
        return list(self.model.tokenizer.encode(check_text(text), add_special_tokens=False))

    def detokenize(self, tokens: list[int], shown: Collection[int] = ()) -> str:
        """Text of token ids, without special tokens but those in `shown`; empty for a model without a tokenizer."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return ""
        runs = groupby(tokens, key=lambda token: token in shown) if shown else [(False, tokens)]
        return "".join(tokenizer.decode(list(run), skip_special_tokens=not there) for there, run in runs)

    # -- store --------------------------------------------------------------------------------------------------------

    @property
    def tiers(self) -> tuple[Store, ...]:
        """Where records are found that memory doesn't have: pinned host memory, if it is used, and the store's tiers."""
        host = () if self.host is None else (self.host,)
        return host + (() if self.store is None else self.store.tiers)

    @property
    def writing(self) -> int:
        """Records that wait to be written to the store or to host memory, and the one being written."""
        return sum(not write.done() for write, _ in list(self._writes))

    def tier(self, key: str, salt: str | None = None) -> str | None:
        """Where a tenant's span's KV is now: "memory", "host", the store's first tier that has it, or None. Changes nothing."""
        for held in (self.scheduler.memory.pool, self.host):
            if held is not None and held.contains(key):
                return held.name
        store = self._store_of(self.salt if salt is None else salt)
        tiers = () if store is None else store.tiers
        return next((tier.name for tier in tiers if tier.contains(key)), None)

    def forget(self, keys: Iterable[str], salt: str | None = None) -> None:
        """Drop a tenant's records from memory and, after pending writes, from the store.

        Records that a request needs now stay in memory until they are evicted like any other. The call doesn't wait for
        the store; records that it can't remove are logged.
        """
        with self._lock:
            keys = list(keys)
            for key in keys:
                if key not in self.scheduler.memory.holds:
                    self.scheduler.memory.pool.delete(key)
            if self._writer is not None:
                self._pending.append((self.salt if salt is None else salt, keys))
                self._writes.append((self._writer.submit(self._work_off), 0))

    def flush(self) -> None:
        """Wait until every encoded record has been offered to the store, and every forgotten one removed."""
        with self._lock:
            writes = list(self._writes)
        for write, _ in writes:
            write.result()

    def close(self) -> None:
        """Write what is pending and close the store. Idempotent; nothing is written afterwards."""
        with self._lock:
            writer, self._writer = self._writer, None
            if self.loader is not None:
                self.loader.close()
        if writer is not None:
            writer.shutdown()
            for kept in (self.host, self.store):
                if kept is not None:
                    kept.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self, request: Request) -> None:
        """One step, unless another thread has just finished the request."""
        with self._lock:
            ran = request.finished or self.scheduler.step()
        self._await_store(ran)

    def _await_store(self, ran: bool) -> None:
        """Where nothing could run, wait a moment for what is being read, without the lock."""
        if not ran and self.loader is not None:
            self.loader.wait(PATIENCE)

    def _enqueued(self, request: Request) -> Request:
        self.enqueue(request)
        return request

    def _finished(self, pending: dict[Request, int]) -> Iterator[tuple[int, Result | KVGraphError]]:
        """Run a step and remove finished requests from `pending`."""
        self._advance(next(iter(pending)))
        for request in [r for r in pending if r.finished]:
            yield pending.pop(request), self._outcome(request)

    def _outcome(self, request: Request) -> Result | KVGraphError:
        try:
            return self.wait(request)
        except KVGraphError as error:
            return error

    def _results(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """As `run`, but raises the first error."""
        with closing(self.run(requests)) as outcomes:
            for i, outcome in outcomes:
                if isinstance(outcome, KVGraphError):
                    raise outcome
                yield i, outcome

    @contextmanager
    def _all_or_none(self, requests: Iterable[Request]) -> Iterator[None]:
        """After any error inside, including Ctrl-C, none of the requests is left running."""
        try:
            yield
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise

    def _store_of(self, salt: str) -> Store | None:
        """The store for a tenant's records."""
        if self.store is not None and salt not in self._stores:
            self._stores[salt] = self.store.for_tenant(salt)
        return self._stores.get(salt)

    def _fetch(self, key: str, salt: str) -> Found | None:
        store = self._store_of(salt)
        found = None if store is None else store.get(key)
        if found is None:
            return None
        record, tier = found
        if not self._fits(record):
            return None
        return self.scheduler.pooling.read(record), tier

    def _fits(self, record: Record) -> bool:
        """Whether a record can be of this model. A checksum doesn't say so, and attention doesn't ask."""
        layers, sides = self.model.layers, (record.keys, record.values)
        return len(record.keys) == len(record.values) == len(layers) and all(
            k.dtype == v.dtype == self.model.dtype
            and (k.shape[0], k.shape[2]) == (layer.kv_heads, layer.key_dim)
            and (v.shape[0], v.shape[2]) == (layer.kv_heads, layer.value_dim)
            for layer, k, v in zip(layers, *sides, strict=True)
        )

    def _settle(self, record: Record, queries: list[Tensor]) -> Record:
        """Apply selection and lossy codec before a record's first use, so that every later reader gets the same numbers."""
        if self.selection is not None:
            record = selected(record, self.selection, queries)
        return record if self.codec.lossless else packed(record, self.codec)

    def _save(self, record: Record, salt: str) -> None:
        """Hand a record to the writer thread. If its queue is full, encoding waits for the disk."""
        if self._writer is None:
            return
        self._writes = [(write, size) for write, size in self._writes if not write.done()]
        while len(self._writes) >= WRITES or sum(size for _, size in self._writes) > WAITING:
            self._writes.pop(0)[0].result()
        self._pending.append((salt, record))
        self._writes.append((self._writer.submit(self._work_off), record.nbytes))

    def _work_off(self) -> None:
        """Do what is pending next: keep the records in a row of one tenant, or remove some. Another call may have done it."""
        records: list[Record] = []
        whose, size = "", 0
        while self._pending and size < BATCH:
            salt, work = self._pending[0]
            if records and (salt != whose or not isinstance(work, Record)):
                break
            self._pending.popleft()
            if not isinstance(work, Record):
                return self._erase(work, salt)
            records.append(work)
            whose, size = salt, size + work.nbytes
        if records:
            self._write(records, whose)

    def _write(self, records: list[Record], salt: str) -> None:
        store = self._store_of(salt)
        try:
            records = [self.scheduler.pooling.on_host(record) for record in records]
            if self.host is not None:
                self.host.put_all([replace(record, packed=None) for record in records])
            if store is None:
                return
            if self.codec.name != "raw":
                records = [record if record.packed else packed(record, self.codec) for record in records]
            errors: dict[str, Exception] = dict(store.put_all(records))
        except Exception as error:  # it is a cache: a record that can't be written is computed again later
            errors = {record.key: error for record in records}
        self.stored_bytes += sum(record.stored_bytes for record in records if record.key not in errors)
        self.store_errors += len(errors)
        if errors and self.store_error is None:
            first = next(iter(errors.values()))
            self.store_error = first if isinstance(first, StoreError) else StoreError(repr(first))
            log.warning("the store can't keep records, continuing without it: %s", first)

    def _erase(self, keys: Iterable[str], salt: str) -> None:
        stores = [store for store in (self.host, self._store_of(salt)) if store is not None]
        errors = []
        for store, key in product(stores, keys):
            try:
                store.delete(key)
            except StoreError as error:  # the others can still go
                errors.append(error)
        if errors:
            log.warning("the store can't remove records (%d): %s", len(errors), errors[0])

    def _warn_untuned(self, method: Method) -> None:
        if method.needs_tuning and method.name not in self.model.tuned_for and method.name not in self._warned:
            self._warned.add(method.name)
            warnings.warn(
                f"this model doesn't declare tuning for {method.name!r}; answers may be worse than with 'full'. "
                f"`kvgraph check MODEL --method {method.name} --data FILE` measures by how much",
                stacklevel=_outside(),
            )


def load_model(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    device: str = "cpu",
    allow_untested: bool = False,
    check: bool = True,
) -> models.Model:
    """Load a model to be run, not saved or trained, and, unless check is False, pass the gate. Raises ModelError with the
    reason.
    """
    with ThreadPoolExecutor(1) as beside:  # reading weights leaves a processor idle
        on_cpu = str(device).startswith("cpu")
        if on_cpu:
            beside.submit(cpu.compiled)  # which imports Numba
        loaded = models.load(
            model, adapter=adapter, dtype=dtype, quantize=quantize, device=device, allow_untested=allow_untested
        )
        if on_cpu:
            beside.submit(cpu.warm, loaded.hf.dtype)
        models.order(loaded.hf)
    if check:
        gate.require(loaded, composed(loaded))
    return loaded


def composed(model: models.Model) -> gate.Logits:
    """The logits that the gate compares, from an engine of its own, so that a broken model's KV reaches no store."""
    return Engine(model, kv_budget=2 * gate.LONGEST * model.kv_bytes_per_token).logits


def prompt_tokens(plan: Plan) -> Iterator[int]:
    """The tokens that the answer can attend to before decoding: those that the prompt span sees, and its own."""
    for place in plan.prompt.sees:
        yield from plan.spans[place.span].tokens[place.lo : place.hi]
    yield from plan.prompt.tokens


def params_of(params: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    """Sampling parameters from an object, keywords, or both (keywords win); unknown names raise a clear error."""
    known = set(SamplingParams.__dataclass_fields__)
    if unknown := sorted(set(fields) - known):
        raise SamplingError(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return replace(params or SamplingParams(), **fields)


def default_budget(device: torch.device, scratch: int = 0) -> int:
    """The default KV budget in bytes: half of the free memory, or 80 % of the free GPU memory; less if the `scratch` bytes that a
    step takes need more than the rest. Raises CapacityError if they leave nothing.
    """
    if device.type == "cuda":
        free, share = torch.cuda.mem_get_info(device)[0], 0.8
    elif device.type == "cpu":
        free, share = int(psutil.virtual_memory().available), 0.5
    else:
        raise CapacityError(f"give kv_budget: kvgraph can't tell how much memory a {device.type!r} device has")
    budget = int(min(free * share, free * 0.95 - scratch))
    if budget <= 0:
        raise CapacityError(
            f"a step takes up to {scratch:,} bytes besides KV, and {free:,} are free: give a smaller max_step_tokens, or free memory"
        )
    return budget


def _read_into(tiers: Iterable[Store], memory: Callable[[int], Tensor]) -> None:
    """Have folders read records straight into such memory, without a copy between."""
    for tier in tiers:
        if isinstance(tier, DiskStore):
            tier.memory = memory


def _outside() -> int:
    """The stacklevel of a warning that should point to the first caller outside this file."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame, depth = frame.f_back, depth + 1
    return depth


def _check_selectable(model: models.Model, selection: Selection) -> None:
    """Raise KVGraphError for a model whose records can't have fewer tokens."""
    if any(layer.window is not None for layer in model.layers):
        raise KVGraphError(f"selection {selection.name} needs a model without sliding windows; leave it out")
    if model.device.type != "cpu":
        raise KVGraphError(f"selection {selection.name} works on CPUs only so far; leave it out, or use device cpu")
