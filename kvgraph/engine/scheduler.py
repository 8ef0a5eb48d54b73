"""Continuous batching: which rows run in the next step, and what their results change.

Everything is a row: a span being encoded, a live span being prefilled, a request decoding one token. A step serves
decoding rows first, then prefill, then encoding, up to a number of tokens; long rows run in chunks.

Memory: a request is admitted when the worst case of all its spans and of its own KV fits the budget at once, so two
half-admitted requests can never wait for each other. What an admitted request may need is *held*: in the pool it is
pinned, missing it is encoded once for everyone who waits (single flight). The rest of the pool is LRU.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.step import Row, RowKV, Step, View
from kvgraph.engine.request import UNCACHED, Encoding, Request, Sequence, sequence_of
from kvgraph.engine.result import Result
from kvgraph.engine.sampling import Sampled, best
from kvgraph.errors import CapacityError, PlanError
from kvgraph.models import Model
from kvgraph.store.memory import MemoryStore
from kvgraph.store.record import Record

Work = tuple[Request | Encoding, int]  # who runs in a step, and how many of its tokens


class Scheduler:
    """Requests in, results out; `step()` runs one packed forward. Not thread-safe: the engine guards it.

    fetch(key): a record from the backing store and its tier's name, or None. save(record): hand a new record to it.
    """

    def __init__(
        self,
        model: Model,
        budget: int,
        max_step_tokens: int,
        fetch: Callable[[str], tuple[Record | None, str]],
        save: Callable[[Record], None],
    ):
        self.model, self.budget, self.max_step_tokens = model, budget, max_step_tokens
        self.max_step_pairs = 16 * max_step_tokens  # bounds the scratch of (token, place) pairs
        self.fetch, self.save = fetch, save
        self.pool = MemoryStore(budget)
        self.shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
        self.waiting: deque[Request] = deque()
        self.encodings: dict[str, Encoding] = {}  # in order of creation: sources before their readers
        self.running: list[Request] = []  # admitted, not finished
        self.holds: dict[str, tuple[int, int]] = {}  # key -> (bytes, requests that may need it)
        self.row_bytes = 0  # own KV of admitted requests
        self.peak_bytes = 0

    # -- submitting ---------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise PlanError or CapacityError if a request can never run. Needs no lock: it looks at nothing that changes."""
        plan, limit = request.plan, self.model.limit
        if plan.highest_position >= limit:
            raise PlanError(f"the plan reaches position {plan.highest_position}, but the model's limit is {limit}")
        for span in plan.spans:
            if not 0 <= min(span.tokens) <= max(span.tokens) < self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise PlanError(f"{span.name or 'a span'} holds a token id outside the vocabulary (0..{last})")
        need = sum(self._worst_case(request).values()) + self._own_bytes(request)
        if need > self.budget:
            raise CapacityError(
                f"the request needs {need:,} bytes of KV at once, but the engine's budget is {self.budget:,}; "
                "raise kv_budget, or use fewer documents or a smaller max_tokens"
            )

    def submit(self, request: Request) -> None:
        """Queue a request that passed `check`."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now and free what it held; its result says "cancelled". No effect on a finished one."""
        if request.finished:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        with self._blaming(request):
            self._finish(request, "cancelled")

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self.waiting and not self.running

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held now: the pool, spans being encoded and the requests' own, by capacity."""
        encoding = sum(e.sequence.kv.nbytes for e in self.encodings.values() if e.sequence.kv is not None)
        return self.pool.bytes + encoding + self.row_bytes

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, run one packed forward, hand out its results."""
        self._admit()
        work = self._choose()
        if not work:
            assert not self.running, "admitted requests, but nothing can run"  # better than waiting forever
            return
        new = [e.sequence for e, _ in work if isinstance(e, Encoding) and e.sequence.kv is None]
        self._make_room(sum(s.capacity for s in new) * self.model.kv_bytes_per_token)
        try:
            rows = [self._row(owner.sequence, count) for owner, count in work]
            step = Step(rows, self.model.layers, self.model.rotaries, self.model.device)
            want, counts = self._wanted(work, step)
            logits = self.model.forward(step.tokens, step.positions, step, want)
        except Exception as error:  # out of memory, say: the rows of this step fail, everything else goes on
            for owner, _ in work:
                self._fail(owner, error)
            return
        self.peak_bytes = max(self.peak_bytes, self.kv_bytes)
        at = 0
        for (owner, _), row, n in zip(work, rows, counts, strict=True):
            with self._blaming(owner):
                row.commit()  # only now: after an interrupt, the rows not handed out just run again
                if isinstance(owner, Encoding):
                    self._encoded(owner)
                else:
                    self._decoded(owner, logits[at : at + n])
            at += n

    def _choose(self) -> list[Work]:
        """Rows of the next step and how many tokens each: decoding first, then prefill, then encoding, oldest first.

        Only the oldest request's encodings go before prefill: so, however much work arrives, nothing waits forever.
        """
        ready = [r for r in self.running if not r.missing]
        decoding = [r for r in ready if r.token_ids]
        prefill = [r for r in ready if not r.token_ids]
        encoding = [e for e in self.encodings.values() if all(k in self.pool for k, *_ in e.sequence.places)]
        work: list[Work] = []
        tokens, pairs = self.max_step_tokens, self.max_step_pairs
        oldest = [e for e in encoding if self.running[0] in e.waiters]
        later = [e for e in encoding if self.running[0] not in e.waiters]
        owners: list[Request | Encoding] = [*decoding, *oldest, *prefill, *later]
        for owner in owners:
            parts = 1 + len(owner.sequence.places)
            count = min(owner.sequence.left, tokens, max(1, pairs // parts))
            if count <= 0 or (work and pairs < parts):
                break
            work.append((owner, count))
            tokens, pairs = tokens - count, pairs - count * parts
        return work

    def _row(self, sequence: Sequence, count: int) -> Row:
        """The next `count` tokens of a sequence; its KV is allocated with its first row."""
        if sequence.kv is None:
            sequence.kv = RowKV(self.shapes, sequence.capacity, self.model.dtype, self.model.device)
            sequence.views = [View(self._pooled(key), *how) for key, how in sequence.places]
        here = slice(sequence.done, sequence.done + count)
        return Row(sequence.tokens[here], sequence.positions[here], sequence.views, sequence.kv)

    def _wanted(self, work: list[Work], step: Step) -> tuple[Tensor, list[int]]:
        """Packed indices whose logits are needed, and how many of them belong to each row."""
        want: list[int] = []
        counts = []
        for (owner, count), here in zip(work, step.spans, strict=True):
            before = len(want)
            if isinstance(owner, Request):
                first = 0 if owner.echo else len(owner.plan.live.tokens) - max(1, len(owner.answer))
                skipped = max(0, first - owner.sequence.done)
                want.extend(range(here.start + skipped, here.start + count))
            counts.append(len(want) - before)
        return torch.tensor(want, dtype=torch.int64, device=self.model.device), counts

    # -- results of a step --------------------------------------------------------------------------------------------

    def _encoded(self, encoding: Encoding) -> None:
        if encoding.sequence.left:
            return
        assert encoding.sequence.kv is not None
        record = encoding.sequence.kv.record(encoding.key)
        del self.encodings[encoding.key]
        self._keep(record)
        while encoding.waiters:
            request = encoding.waiters.pop()
            request.missing.discard(encoding.key)
            if not request.missing:
                self._ready(request)
        if encoding.persistent:
            self.save(record)  # last: it may wait for the disk, and be interrupted there

    def _decoded(self, request: Request, logits: Tensor) -> None:
        sequence = request.sequence
        if request.answer:
            self._score(request, logits)
        if sequence.left:
            return
        if request.answer and not request.echo:
            return self._finish(request, "length")
        if not request.token_ids:
            self._first(request, logits)
        choice = request.sampler(logits[-1])
        request.sampled.append(choice)
        request.token_ids.append(choice.token)
        ends = choice.token in request.params.stop_token_ids or (
            not request.params.ignore_eos and choice.token in self.model.eos_ids
        )
        request.fresh.append(("" if ends else request.stream.push(choice.token), choice.token))
        if ends or request.stream.stopped:
            return self._finish(request, "stop")
        if sequence.done >= sequence.capacity:  # its last token needs no KV of its own
            return self._finish(request, "length")
        sequence.tokens.append(choice.token)
        sequence.positions = np.append(sequence.positions, sequence.positions[-1] + 1)

    def _first(self, request: Request, logits: Tensor) -> None:
        request.first_token_at = time.perf_counter()
        request.usage.ttft = request.first_token_at - request.submitted
        if request.keep_logits:
            request.first_logits = logits[-1].cpu().clone()

    def _score(self, request: Request, logits: Tensor) -> None:
        """Log-probabilities of the answer's next tokens, from the logits of those before them."""
        for row, target in zip(logits, request.answer[len(request.scores) :], strict=False):
            logprobs = torch.log_softmax(row.float(), -1)
            request.scores.append(logprobs[target].clone())
            if (n := request.params.logprobs) is not None:
                request.scored.append(Sampled(target, float(logprobs[target]), best(logprobs, n)))
            request.greedy = request.greedy and int(row.argmax()) == target

    @contextmanager
    def _blaming(self, owner: Request | Encoding) -> Iterator[None]:
        """What goes wrong inside (NaN logits, a tokenizer, a store) ends this owner and no other.

        An interrupt ends it too, for it may be half changed, and goes on to the caller.
        """
        try:
            yield
        except BaseException as error:
            self._fail(owner, error)
            if not isinstance(error, Exception):
                raise

    def _fail(self, owner: Request | Encoding, error: BaseException) -> None:
        """End a request, or all that wait for an encoding, with an error."""
        for request in list(owner.waiters) if isinstance(owner, Encoding) else [owner]:
            self._finish(request, error=error)

    def _finish(self, request: Request, reason: str = "", error: BaseException | None = None) -> None:
        """End a request, with a result or an error; frees all it held. No effect on a finished one."""
        if request.finished:
            return
        now = time.perf_counter()
        if request in self.running:
            self.running.remove(request)
            self.row_bytes -= self._own_bytes(request)
        for key in list(request.held):
            self._release(request, key)
        for key in request.missing:
            encoding = self.encodings.get(key)
            if encoding is not None:
                encoding.waiters.discard(request)
                if not encoding.waiters:
                    del self.encodings[key]
        request.missing = set()
        request.sequence.kv, request.sequence.views = None, []
        if error is not None:
            request.error = error
            return
        if not request.stream.stopped:
            tail = request.stream.finish()
            if tail:
                request.fresh.append((tail, -1))
        usage = request.usage
        usage.completion_tokens = len(request.token_ids)
        usage.decode = now - request.first_token_at if request.first_token_at else 0.0
        request.result = Result(
            request.stream.text,
            request.token_ids,
            reason,
            usage,
            request.sampled,
            request.first_logits,
            torch.stack(request.scores).cpu() if request.scores else torch.empty(0),
            request.greedy,
        )

    # -- admission and memory -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            spans = self._worst_case(request)
            need = sum(b for k, b in spans.items() if k not in self.holds) + self._own_bytes(request)
            if sum(b for b, _ in self.holds.values()) + self.row_bytes + need > self.budget:
                return  # first come, first served: nothing overtakes a request that waits for memory
            self.waiting.popleft()
            self.running.append(request)
            self.row_bytes += self._own_bytes(request)
            self._make_room(0)
            for key, size in spans.items():
                self._hold(request, key, size)
            request.usage.queued = time.perf_counter() - request.submitted
            with self._blaming(request):
                self._resolve(request)
                if not request.missing:
                    self._ready(request)

    def _resolve(self, request: Request) -> None:
        """Find or start everything the live span reads; what is missing pulls in its own sources, transitively."""
        usage, spans = request.usage, request.plan.spans
        need = sorted({p.span for p in request.plan.live.sees})
        seen: set[str] = set()
        stack = need[::-1]
        started: list[int] = []
        while stack:
            index = stack.pop()
            key, span = request.keys[index], spans[index]
            if key in seen:
                continue
            seen.add(key)
            tier = self._find(key) if span.cached else None
            if tier is None and key in self.encodings:
                tier = "shared"
            if tier is None:
                started.append(index)
                usage.computed_tokens += len(span)
            else:
                usage.reused_tokens[tier] = usage.reused_tokens.get(tier, 0) + len(span)
            if tier in (None, "shared"):
                request.missing.add(key)
                stack.extend(p.span for p in span.sees)
        for index in sorted(started):  # plan order: sources before their readers
            self.encodings[request.keys[index]] = self._encoding(request, index)
        for key in request.missing:
            self.encodings[key].waiters.add(request)

    def _find(self, key: str) -> str | None:
        """Where a record was found ("memory" or a tier of the store); it is in the pool afterwards."""
        if self.pool.get(key) is not None:
            return "memory"
        record, tier = self.fetch(key)
        if record is None:
            return None
        self._make_room(record.nbytes)
        self._keep(record)
        return tier

    def _encoding(self, request: Request, index: int) -> Encoding:
        span = request.plan.spans[index]
        return Encoding(request.keys[index], sequence_of(span, request.keys), persistent=span.cached)

    def _ready(self, request: Request) -> None:
        """Everything the live span reads is in the pool: intermediate versions are no longer needed."""
        request.usage.encoded = time.perf_counter() - request.submitted
        wanted = {request.keys[p.span] for p in request.plan.live.sees}
        for key in [k for k in request.held if k not in wanted]:
            self._release(request, key)
        request.usage.kv_bytes = sum(self.holds[k][0] for k in wanted) + self._own_bytes(request)
        if request.encode_only:
            self._finish(request, "length")

    def _worst_case(self, request: Request) -> dict[str, int]:
        per_token = self.model.kv_bytes_per_token
        return {k: len(s) * per_token for k, s in zip(request.keys, request.plan.spans[:-1], strict=False)}

    def _own_bytes(self, request: Request) -> int:
        return 0 if request.encode_only else request.sequence.capacity * self.model.kv_bytes_per_token

    def _hold(self, request: Request, key: str, size: int) -> None:
        _, count = self.holds.get(key, (size, 0))
        self.holds[key] = (size, count + 1)
        request.held.add(key)
        if count == 0 and key in self.pool:
            self.pool.pin(key)

    def _release(self, request: Request, key: str) -> None:
        size, count = self.holds[key]
        request.held.discard(key)
        if count > 1:
            self.holds[key] = (size, count - 1)
            return
        del self.holds[key]
        if key in self.pool:
            self.pool.unpin(key)
            if key.startswith(UNCACHED):  # nobody else can ever ask for it
                self.pool.delete(key)

    def _pooled(self, key: str) -> Record:
        record = self.pool.get(key)
        assert record is not None, "what a row reads is pinned"
        return record

    def _keep(self, record: Record) -> None:
        self._make_room(0)
        self.pool.put(record)
        if record.key in self.holds:
            self.pool.pin(record.key)

    def _make_room(self, size: int) -> None:
        """Evict what nobody holds until `size` more bytes fit beside all own KV and running encodings."""
        encoding = sum(e.sequence.kv.nbytes for e in self.encodings.values() if e.sequence.kv is not None)
        self.pool.evict_to(max(0, self.budget - self.row_bytes - encoding - size))
