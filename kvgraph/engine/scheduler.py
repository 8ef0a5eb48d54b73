"""Continuous batching: which rows run in the next step, and what happens with their results.

Everything is a row: a span being encoded, a prompt span being prefilled, a request decoding one token. A step serves
decoding rows first, then prefill, then encoding, up to a number of tokens; long rows run in chunks.

A request is admitted when it fits `kvgraph.engine.admission.Memory`. Spans that it then misses are encoded once for all
requests that wait for them (single flight).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvgraph.attention.rows import Row, RowKV, View
from kvgraph.engine.admission import Memory
from kvgraph.engine.request import Encoding, Request, Sequence, sequence_of
from kvgraph.engine.result import Result
from kvgraph.engine.runner import runner_for
from kvgraph.errors import PlanError
from kvgraph.models import Model
from kvgraph.store.base import Found
from kvgraph.store.record import Record

Work = tuple[Request | Encoding, int]  # who runs in a step, and how many of its tokens


class Scheduler:
    """Requests in, results out; `step()` runs one packed forward. Not thread-safe: the engine guards it.

    fetch(key): a record of the store and its tier's name, or None. save(record): hands a new record to the store.
    """

    def __init__(
        self,
        model: Model,
        budget: int,
        max_step_tokens: int,
        fetch: Callable[[str], Found | None],
        save: Callable[[Record], None],
    ):
        self.model, self.max_step_tokens = model, max_step_tokens
        self.max_step_pairs = 16 * max_step_tokens  # bounds the scratch of (token, place) pairs
        self.fetch, self.save = fetch, save
        self.runner = runner_for(model)
        self.shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
        self.waiting: deque[Request] = deque()
        self.encodings: dict[str, Encoding] = {}  # in order of creation: sources before their readers
        self.running: list[Request] = []  # admitted, not finished
        self.memory = Memory(budget, model.kv_bytes_per_token, self.encodings)
        self.peak_bytes = 0

    # -- submitting ---------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise PlanError or CapacityError if a request can never run. Needs no lock: it reads no changing state."""
        plan, limit = request.plan, self.model.limit
        if plan.highest_position >= limit:
            raise PlanError(f"the plan reaches position {plan.highest_position}, but the model's limit is {limit}")
        for span in plan.spans:
            if not 0 <= min(span.tokens) <= max(span.tokens) < self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise PlanError(f"{span.name or 'a span'} holds a token id outside the vocabulary (0..{last})")
        self.memory.check(request)

    def submit(self, request: Request) -> None:
        """Queue a request that passed `check`."""
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now and free what it held. Its result says "cancelled". No effect on a finished request."""
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

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Admit requests that fit, run one packed forward, and distribute its results."""
        self._admit()
        work = self._choose()
        if not work:
            assert not self.running, "admitted requests, but nothing can run"  # better than waiting forever
            return
        new = [e.sequence for e, _ in work if isinstance(e, Encoding) and e.sequence.kv is None]
        self.memory.make_room(sum(s.capacity for s in new) * self.model.kv_bytes_per_token)
        try:
            rows = [self._row(owner.sequence, count) for owner, count in work]
            want, counts = self._wanted(work)
            logits = self.runner.run(rows, want)
        except Exception as error:  # such as out of memory: the rows of this step fail, all others continue
            for owner, _ in work:
                self._fail(owner, error)
            return
        self.peak_bytes = max(self.peak_bytes, self.memory.kv_bytes)
        best = self._best(work, logits, counts)
        at = 0
        for (owner, _), row, n in zip(work, rows, counts, strict=True):
            with self._blaming(owner):
                row.commit()  # only now: after an interrupt, rows without results run again
                if isinstance(owner, Encoding):
                    self._encoded(owner)
                else:
                    self._decoded(owner, logits[at : at + n], best.get(owner))
            at += n

    def _choose(self) -> list[Work]:
        """Rows of the next step and how many tokens each: decoding first, then prefill, then encoding, oldest first.

        Only the oldest request's encodings go before prefill, so that nothing waits forever however much work arrives.
        A reader may run in the same step as its sources, because every layer writes all rows' keys and values before
        any row attends. It waits only for sources that this step doesn't complete.
        """
        decoding = [r for r in self.running if r.token_ids]
        prefill = [r for r in self.running if not r.token_ids]
        oldest = [e for e in self.encodings.values() if self.running[0] in e.waiters]
        later = [e for e in self.encodings.values() if self.running[0] not in e.waiters]
        work: list[Work] = []
        complete: set[str] = set()  # encodings that this step finishes
        tokens, pairs = self.max_step_tokens, self.max_step_pairs
        owners: list[Request | Encoding] = [*decoding, *oldest, *prefill, *later]
        for owner in owners:
            if not self._ready_beside(owner, complete):
                continue
            parts = 1 + len(owner.sequence.places)
            count = min(owner.sequence.left, tokens, max(1, pairs // parts))
            if count <= 0 or (work and pairs < parts):
                break
            work.append((owner, count))
            if isinstance(owner, Encoding) and count == owner.sequence.left:
                complete.add(owner.key)
            tokens, pairs = tokens - count, pairs - count * parts
        return work

    def _ready_beside(self, owner: Request | Encoding, complete: set[str]) -> bool:
        """Whether everything a row reads is there, or will be in a step that completes these encodings."""
        if isinstance(owner, Request):
            return not owner.encode_only and owner.missing <= complete
        return all(k in complete or k in self.memory.pool for k, *_ in owner.sequence.places)

    def _row(self, sequence: Sequence, count: int) -> Row:
        """The next `count` tokens of a sequence. Its KV is allocated with its first row."""
        if sequence.kv is None:
            sequence.kv = RowKV(self.shapes, sequence.capacity, self.model.dtype, self.model.device)
            sequence.kv.positions[: len(sequence.positions)] = sequence.positions
            sequence.views = [View(self._source(key), *how) for key, how in sequence.places]
        here = slice(sequence.done, sequence.done + count)
        return Row(sequence.tokens[here], sequence.positions[here], sequence.views, sequence.kv)

    def _source(self, key: str) -> Record | RowKV:
        """What a row reads: a pinned record, or the KV of a row that is completed in the same step."""
        encoding = self.encodings.get(key)
        if encoding is None:
            return self.memory.pooled(key)
        assert encoding.sequence.kv is not None, "sources come before their readers"
        return encoding.sequence.kv

    def _wanted(self, work: list[Work]) -> tuple[list[int], list[int]]:
        """Packed indices whose logits are needed, and how many of them belong to each row."""
        want: list[int] = []
        counts = []
        start = 0
        for owner, count in work:
            before = len(want)
            if isinstance(owner, Request):
                first = len(owner.plan.prompt.tokens) - max(1, len(owner.answer))
                skipped = max(0, first - owner.sequence.done)
                want.extend(range(start + skipped, start + count))
            counts.append(len(want) - before)
            start += count
        return want, counts

    # -- results of a step --------------------------------------------------------------------------------------------

    def _encoded(self, encoding: Encoding) -> None:
        if encoding.sequence.left:
            return
        assert encoding.sequence.kv is not None
        record = encoding.sequence.kv.record(encoding.key)
        del self.encodings[encoding.key]
        self.memory.keep(record)
        while encoding.waiters:
            request = encoding.waiters.pop()
            request.missing.discard(encoding.key)
            if not request.missing:
                self._ready(request)
        if encoding.persistent:
            self.save(record)  # last, because it may wait for the disk and be interrupted there

    def _best(self, work: list[Work], logits: Tensor, counts: list[int]) -> dict[Request, tuple[int, float]]:
        """The most likely token and its logit, of each request that takes it, with one read from the device for all."""
        last: dict[Request, int] = {}
        at = 0
        for (owner, count), n in zip(work, counts, strict=True):
            at += n
            if isinstance(owner, Request) and count == owner.sequence.left and owner.params.takes_best:
                last[owner] = at - 1
        if len(last) < 2:
            return {}
        rows = logits[torch.tensor(list(last.values()))] if len(last) < len(logits) else logits
        found = torch.stack([rows.argmax(-1).double(), rows.amax(-1).double()]).tolist()
        return {r: (int(token), logit) for r, token, logit in zip(last, *found, strict=True)}

    def _decoded(self, request: Request, logits: Tensor, best: tuple[int, float] | None) -> None:
        sequence = request.sequence
        if request.answer:
            self._score(request, logits)
        if sequence.left:
            return
        if request.answer:
            return self._finish(request, "length")
        if not request.token_ids:
            self._first(request, logits)
        choice = request.sampler(logits[-1], best)
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
        for row in logits:
            target = request.answer[len(request.scores)]
            request.scores.append(torch.log_softmax(row.float(), -1)[target].clone())
            request.greedy = request.greedy and int(row.argmax()) == target

    @contextmanager
    def _blaming(self, owner: Request | Encoding) -> Iterator[None]:
        """An error inside (NaN logits, a tokenizer, a store) ends this owner and no other.

        An interrupt also ends it, because it may be half changed, and is passed on to the caller.
        """
        try:
            yield
        except BaseException as error:
            self._fail(owner, error)
            if not isinstance(error, Exception):
                raise

    def _fail(self, owner: Request | Encoding, error: BaseException) -> None:
        """End a request, or all requests that wait for an encoding, with an error."""
        for request in list(owner.waiters) if isinstance(owner, Encoding) else [owner]:
            self._finish(request, error=error)

    def _finish(self, request: Request, reason: str = "", error: BaseException | None = None) -> None:
        """End a request with a result or an error, and free everything it held. No effect on a finished request."""
        if request.finished:
            return
        now = time.perf_counter()
        if request in self.running:
            self.running.remove(request)
            self.memory.leave(request)
        for key in list(request.held):
            self.memory.release(request, key)
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

    # -- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if not self.memory.fits(request):
                return  # first come, first served: no request overtakes one that waits for memory
            self.waiting.popleft()
            self.running.append(request)
            self.memory.admit(request)
            request.usage.queued = time.perf_counter() - request.submitted
            with self._blaming(request):
                self._resolve(request)
                if not request.missing:
                    self._ready(request)

    def _resolve(self, request: Request) -> None:
        """Find or start everything the prompt span reads. A missing span needs its own sources, transitively."""
        usage, spans = request.usage, request.plan.spans
        need = sorted({p.span for p in request.plan.prompt.sees})
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
        """Where a record was found ("memory" or a tier of the store). Afterwards it is in the pool."""
        if key in self.memory.pool:
            return "memory"
        found = self.fetch(key)
        if found is None:
            return None
        record, tier = found
        self.memory.make_room(record.nbytes)
        self.memory.keep(record)
        return tier

    def _encoding(self, request: Request, index: int) -> Encoding:
        span = request.plan.spans[index]
        return Encoding(request.keys[index], sequence_of(span, request.keys), persistent=span.cached)

    def _ready(self, request: Request) -> None:
        """Release intermediate versions once everything the prompt span reads is in the pool."""
        request.usage.encoded = time.perf_counter() - request.submitted
        wanted = {request.keys[p.span] for p in request.plan.prompt.sees}
        for key in [k for k in request.held if k not in wanted]:
            self.memory.release(request, key)
        request.usage.kv_bytes = self.memory.held_bytes(request, wanted)
        if request.encode_only:
            self._finish(request, "length")
