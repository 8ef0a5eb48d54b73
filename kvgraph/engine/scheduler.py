"""Continuous batching: which rows run in the next step, and what happens with their results.

Everything is a row: a span being encoded, a prompt span being prefilled, a request decoding one token. A step serves
decoding rows first, then prefill, then encoding, up to a number of tokens; long rows run in chunks.

A request is admitted when it fits `kvgraph.engine.admission.Memory`. What it then misses is read from the store beside
the steps, and encoded if it isn't there or comes too late: once for everyone who waits (single flight).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from itertools import count as counter

import torch
from torch import Tensor

from kvgraph.attention.rows import Row, RowKV, View, gathered
from kvgraph.engine.admission import Memory
from kvgraph.engine.guide import Guides
from kvgraph.engine.loader import DEADLINE, Loader
from kvgraph.engine.pooling import Pooling
from kvgraph.engine.request import Encoding, Loading, Request, Sequence, link_of
from kvgraph.engine.result import Result
from kvgraph.engine.runner import runner_for
from kvgraph.engine.sampling import Sampled, likeliest
from kvgraph.engine.scratch import most_logits
from kvgraph.errors import PlanError
from kvgraph.models import Model
from kvgraph.plan import Plan
from kvgraph.store.base import Found
from kvgraph.store.codecs.base import Codec
from kvgraph.store.memory import HostStore
from kvgraph.store.record import Record
from kvgraph.store.selection.base import Selection, kept_tokens

log = logging.getLogger("kvgraph.engine")

AHEAD = 8  # the part of the budget, 1 / AHEAD, that records may take that nobody was admitted to use yet
PAIRS = 16  # (token, place) pairs of a step, per token
Work = tuple[Request | Encoding, int]  # who runs in a step, and how many of its tokens


class Scheduler:
    """Requests in, results out; `step()` runs one packed forward. Not thread-safe: the engine guards it.

    loader: reads records of the backing store; None: there is none. save(record, salt): hand a tenant's new record to it.
    settle(record, queries): what a new record becomes before anything reads it; None: it stays as it is. queries: of its
    last tokens, if the selection looks at them. selection: which tokens of a span are kept; None: all. codec: of the
    records that `settle` makes. host: records in pinned memory, for a GPU's engine; None: there is no such tier.
    """

    def __init__(
        self,
        model: Model,
        budget: int,
        max_step_tokens: int,
        loader: Loader | None,
        save: Callable[[Record, str], None],
        settle: Callable[[Record, list[Tensor]], Record] | None,
        selection: Selection | None,
        codec: Codec,
        host: HostStore | None = None,
    ):
        self.model, self.max_step_tokens, self.host = model, max_step_tokens, host
        self.max_step_pairs = PAIRS * max_step_tokens
        self.max_step_logits = most_logits(model)
        self.loader, self.save, self.settle, self.selection = loader, save, settle, selection
        self.runner = runner_for(model)
        self.guides = Guides(model)
        self._numbers = counter()
        self.shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
        self.waiting: deque[Request] = deque()
        self.encodings: dict[str, Encoding] = {}  # in order of creation: sources before their readers
        self.loading: dict[str, Loading] = {}
        self.ahead: dict[
            str, tuple[str, int]
        ] = {}  # (tier, bytes) of records that were read ahead, until they are used
        self.running: list[Request] = []  # admitted, not finished
        self.pooling = Pooling(model, codec, selection)
        self.memory = Memory(budget, model.kv_bytes_per_token, self.pooling, self.encodings)
        self.peak_bytes = 0

    # -- submitting ---------------------------------------------------------------------------------------------------

    def check_position(self, highest: int) -> None:
        """Raise PlanError for a plan that reaches a position which the model doesn't have."""
        if highest >= self.model.limit:
            raise PlanError(f"the plan reaches position {highest}, but the model's limit is {self.model.limit}")

    def check(self, plan: Plan) -> None:
        """Raise PlanError if a plan can never run. Needs no lock: it reads no changing state."""
        self.check_position(plan.highest_position)
        for span in plan.spans:
            if not 0 <= min(span.tokens) <= max(span.tokens) < self.model.vocab_size:
                last = self.model.vocab_size - 1
                raise PlanError(f"{span.name or 'a span'} holds a token id outside the vocabulary (0..{last})")
        if self.selection is not None:
            _check_selected(plan, self.selection)

    def submit(self, request: Request) -> None:
        """Queue a request that passed `check`."""
        request.number = next(self._numbers)
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
    def step(self) -> bool:
        """Admit what fits, run one packed forward, hand out its results. False if all that is left waits for the store."""
        self._collect()
        self._admit()
        work = self._choose()
        if not work:
            self.pooling.begin()
            if self.running and not self.loading:  # a fault of ours: it ends one request, not the engine
                self._fail(self.running[0], AssertionError("an admitted request, but nothing of it can run"))
                return True
            return not self.loading
        new = [e for e, _ in work if isinstance(e, Encoding) and e.sequence.kv is None]
        ended = {e.key for e in new}
        copies = sum(e.sequence.to_gather for e in new if e.link not in ended)  # only the first row of a chain gathers
        self.memory.make_room((sum(e.sequence.capacity for e in new) + copies) * self.model.kv_bytes_per_token)
        try:
            rows = self._rows(work)
            want, counts = self._wanted(work)
            guided = [o for o, n in work if isinstance(o, Request) and o.guide and n == o.sequence.left]
            finding = self.guides.begin([request.guide for request in guided if request.guide]) if guided else None
            logits = self.runner.run(rows, want)
            self.pooling.begin()
            masks = () if finding is None else finding.result().to(logits.device)
        except Exception as error:  # such as out of memory: the rows of this step fail, all others continue
            for owner, _ in work:
                self._fail(owner, error)
            return True
        self.peak_bytes = max(self.peak_bytes, self.memory.kv_bytes)
        best = self._best(work, logits, counts)
        allowed = dict(zip(guided, masks, strict=True))
        at = 0
        for (owner, _), row, n in zip(work, rows, counts, strict=True):
            with self._blaming(owner):
                row.commit()  # only now: after an interrupt, rows without results run again
                if isinstance(owner, Encoding):
                    self._encoded(owner)
                else:
                    self._decoded(owner, logits[at : at + n], best.get(owner), allowed.get(owner))
            at += n
        return True

    def _choose(self) -> list[Work]:
        """Rows of the next step and how many tokens each: decoding first, then prefill, then encoding, oldest first.

        Rows that decode always fit together, because each began in a step that held it beside the others.

        Only the oldest request's encodings go before prefill: so, however much work arrives, nothing waits forever. A
        reader may stand beside its sources: every layer writes all rows' keys and values before any row attends. So it
        only waits for sources of which some tokens are left after this step, and for those that a lossy codec changes.
        """
        decoding = [r for r in self.running if r.token_ids]
        prefill = [r for r in self.running if not r.token_ids]
        ready = sorted(self.encodings.values(), key=lambda e: e.order)  # sources before their readers
        oldest = [e for e in ready if self.running[0] in e.waiters]
        later = [e for e in ready if self.running[0] not in e.waiters]
        work: list[Work] = []
        complete: set[str] = set()  # encodings that this step finishes
        tokens, pairs, logits = self.max_step_tokens, self.max_step_pairs, self.max_step_logits
        room = self.memory.room_for_extras if self.encodings else 0
        owners: list[Request | Encoding] = [*decoding, *oldest, *prefill, *later]
        for owner in owners:
            if not self._ready_beside(owner, complete):
                continue
            extra = 0 if owner.sequence.kv is not None else self._extra(owner)
            if extra > room:
                continue
            parts = 1 + owner.sequence.parts
            count = min(owner.sequence.left, tokens, max(1, pairs // parts))
            unscored = _unscored(owner)
            count = min(count, unscored + max(1, logits))
            if count <= 0 or (work and pairs < parts):
                break
            logits -= max(0, count - unscored)
            work.append((owner, count))
            room -= extra
            if isinstance(owner, Encoding) and count == owner.sequence.left and not self._settles(owner):
                complete.add(owner.key)
            tokens, pairs = tokens - count, pairs - count * parts
        return work

    def _extra(self, owner: Request | Encoding) -> int:
        """Bytes that a row takes beyond those that are held for its record."""
        return self.memory.extra(owner.sequence.span) if isinstance(owner, Encoding) else 0

    def _settles(self, encoding: Encoding) -> bool:
        """Whether readers must wait for what its KV become."""
        return encoding.persistent and self.settle is not None

    def _ready_beside(self, owner: Request | Encoding, complete: set[str]) -> bool:
        """Whether everything a row reads is there, or will be in a step that completes these encodings."""
        if isinstance(owner, Request):
            return not owner.encode_only and owner.missing <= complete
        if owner.link:  # which has all that this reads, but itself
            return owner.link in complete or owner.link in self.memory.pool
        return all(seen.key in complete or seen.key in self.memory.pool for seen in owner.sequence.places)

    def _rows(self, work: list[Work]) -> list[Row]:
        """The next tokens of each. A new link of a chain whose last link ends in the same step is joined to it."""
        rows: list[Row] = []
        before: Encoding | None = None  # the row before, if another can be joined to it
        lead = 0
        for owner, count in work:
            sequence = owner.sequence
            joined = before is not None and owner.link == before.key and sequence.done == 0
            if sequence.kv is None:
                sequence.kv = RowKV(self.shapes, sequence.capacity, self.model.dtype, self.model.device)
                sequence.kv.positions[: len(sequence.positions)] = sequence.positions
                if self.selection is not None and isinstance(owner, Encoding) and owner.persistent:
                    sequence.kv.window = self.selection.window
            lead = lead + sequence.span.start - sequence.span.sees[-1].at if joined else 0
            views = () if joined else self._views(sequence)
            here = slice(sequence.done, sequence.done + count)
            arrivals = self.pooling.on_the_way(views)
            rows.append(
                Row(sequence.tokens[here], sequence.positions[here], views, sequence.kv, joined, lead, arrivals)
            )
            before = owner if isinstance(owner, Encoding) and count == sequence.left else None
        return rows

    def _views(self, sequence: Sequence) -> SequenceOf[View]:
        """What a sequence's rows see; short spans are gathered once all of them are there, and then it stays the same."""
        if sequence.views is not None:
            return sequence.views
        views = [View(self._source(seen.key), *seen[1:]) for seen in sequence.places]
        if any(isinstance(view.source, RowKV) for view in views):
            return views  # of sources beside it in this step: next time they are records
        if sequence.to_gather:
            for arrival in self.pooling.on_the_way(views):
                arrival.wait()
            rotaries = [None if x.rotary is None else self.model.rotaries[x.rotary] for x in self.model.layers]
            views = list(gathered(views, self.shapes, rotaries, sequence.longest))
            sequence.copied = sum(view.source.nbytes for view in views if isinstance(view.source, RowKV))
        sequence.views = views
        return views

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
            want.extend(range(start + min(count, _unscored(owner)), start + count))
            counts.append(len(want) - before)
            start += count
        return want, counts

    # -- results of a step --------------------------------------------------------------------------------------------

    def _encoded(self, encoding: Encoding) -> None:
        if encoding.sequence.left:
            return
        assert encoding.sequence.kv is not None
        record = encoding.sequence.kv.record(encoding.key)
        if self.settle is not None and encoding.persistent:
            record = self.settle(record, encoding.sequence.kv.queries)
        del self.encodings[encoding.key]
        self.memory.keep(self.pooling.of(record))
        while encoding.waiters:
            request = encoding.waiters.pop()
            request.missing.discard(encoding.key)
            if not request.missing:
                self._ready(request)
        if encoding.persistent:
            self.save(record, encoding.salt)  # last, because it may wait for the disk and be interrupted there

    def _best(self, work: list[Work], logits: Tensor, counts: list[int]) -> dict[Request, tuple[int, float]]:
        """The most likely token and its logit, of each request that takes it, with one read from the device for all."""
        last: dict[Request, int] = {}
        at = 0
        for (owner, count), n in zip(work, counts, strict=True):
            at += n
            if isinstance(owner, Request) and count == owner.sequence.left and owner.params.takes_best:
                last[owner] = at - 1
        if not last:
            return {}
        rows = logits[torch.tensor(list(last.values()))] if len(last) < len(logits) else logits
        best = rows.argmax(-1, keepdim=True)
        found = torch.cat([best.double(), rows.gather(-1, best).double()], -1).T.tolist()
        return {r: (int(token), logit) for r, token, logit in zip(last, *found, strict=True)}

    def _decoded(
        self, request: Request, logits: Tensor, best: tuple[int, float] | None, allowed: Tensor | None
    ) -> None:
        sequence = request.sequence
        if request.answer:
            self._score(request, logits)
        if sequence.left:
            return
        if request.answer and not request.echo:
            return self._finish(request, "length")
        if not request.token_ids:
            self._first(request, logits)
        choice = request.sampler(logits[-1], best, allowed)
        request.sampled.append(choice)
        request.token_ids.append(choice.token)
        ends = choice.token in request.ends
        request.fresh.append(("" if ends else request.stream.push(choice.token), choice.token))
        complete = request.guide is not None and request.guide.take(choice.token)
        if ends or complete or request.stream.stopped:
            return self._finish(request, "stop")
        if sequence.done >= sequence.capacity:  # its last token needs no KV of its own
            return self._finish(request, "length")
        sequence.append(choice.token)

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
            if request.keep_answer:
                request.distributions.append(logprobs.cpu())
            if (n := request.params.logprobs) is not None:
                request.scored.append(Sampled(target, float(logprobs[target]), likeliest(logprobs, n)))
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
            self._stop_waiting(request, key)
            encoding = self.encodings.get(key)
            if encoding is not None:
                encoding.waiters.discard(request)
                if not encoding.waiters:
                    del self.encodings[key]
        request.missing = set()
        request.sequence.kv, request.sequence.views = None, ()
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
            torch.stack(request.distributions) if request.distributions else None,
        )

    # -- admission ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if not self.memory.fits(request):
                return self._look_ahead()  # first come, first served: nothing overtakes one that waits for memory
            self.waiting.popleft()
            self.running.append(request)
            self.memory.admit(request)
            request.usage.queued = time.perf_counter() - request.submitted
            with self._blaming(request):
                self._resolve(request, _read(request))
                if not request.missing:
                    self._ready(request)

    def _resolve(self, request: Request, need: Iterable[int], absent: Collection[str] = ()) -> None:
        """Find, read or encode these spans of a request's plan; what is encoded pulls in its own sources, transitively.

        absent: keys that aren't in the store. If another read of one is under way, its end is awaited all the same.
        """
        spans = request.plan.spans
        stack = sorted(need, reverse=True)
        started: list[int] = []
        while stack:
            index = stack.pop()
            key, span = request.keys[index], spans[index]
            if key in request.resolved:
                continue
            request.resolved.add(key)
            if key in self.memory.pool:
                if self.host is not None:
                    self.host.touch(key)
                ahead = self.ahead.pop(key, None)
                if ahead is not None and self.loader is not None:
                    self.loader.count("ahead_used")
                self._reused(request, index, "memory" if ahead is None else ahead[0])
                continue
            if span.cached and key not in self.encodings and key not in self.loading and self._from_host(key):
                self._reused(request, index, HostStore.name)
                continue
            request.missing.add(key)
            if key in self.encodings:
                self._reused(request, index, "shared")
            elif self.loader is not None and span.cached and (key in self.loading or key not in absent):
                loading = self._load(self.loader, key, len(span), request.salt)
                if loading.ahead:
                    loading.ahead = False
                    self.loader.count("ahead_used")
                loading.waiters[request] = index
                request.loads.add(key)
                continue
            else:
                started.append(index)
                request.usage.computed_tokens += len(span)
            stack.extend(p.span for p in span.sees)
        spare = self.memory.spare // self.memory.per_token if started else 0
        for index in started:
            self.encodings[request.keys[index]] = self._encoding(request, index, spare)
        for key in request.missing & self.encodings.keys():
            self.encodings[key].waiters.add(request)

    @staticmethod
    def _reused(request: Request, index: int, tier: str) -> None:
        reused = request.usage.reused_tokens
        reused[tier] = reused.get(tier, 0) + len(request.plan.spans[index])

    # -- reading ------------------------------------------------------------------------------------------------------

    def _from_host(self, key: str) -> bool:
        """Bring a record from pinned memory, if it is there: it arrives while the step that reads it runs."""
        found = None if self.host is None else self.host.get(key)
        return found is not None and self._bring(found[0])

    def _load(self, loader: Loader, key: str, tokens: int, salt: str, ahead: bool = False) -> Loading:
        """The read of a record, begun if it isn't under way."""
        if key not in self.loading:
            self.loading[key] = Loading(key, self.pooling.nbytes(tokens), time.monotonic() + DEADLINE, ahead)
            loader.start(key, salt)
        return self.loading[key]

    def _collect(self) -> None:
        """Take what the loader has brought; give up what is late. Then go on with whoever waits for no record any more."""
        if self.loader is None:
            return
        ended = [(self.loading.pop(key, None), found) for key, found in self.loader.finished()]
        now = time.monotonic()
        for late in [loading for loading in self.loading.values() if now > loading.deadline]:
            ended.append((self.loading.pop(late.key), None))
            self.loader.cancel(late.key)
            self.loader.count("late")
        waited: dict[Request, None] = {}
        absent: set[str] = set()
        for loading, found in ended:
            if loading is None:  # nobody waits any more, and it wasn't read ahead
                continue
            if not self._loaded(loading, found):
                absent.add(loading.key)
            waited |= dict.fromkeys(loading.waiters)
        for request in waited:
            if not request.loads:
                with self._blaming(request):
                    self._encode_absent(request, absent)

    def _loaded(self, loading: Loading, found: Found | None) -> bool:
        """A record has come, or there is none. Returns whether there is one."""
        if found is not None and found[0].nbytes != loading.nbytes:  # it isn't of this span's tokens
            found = None
        if found is not None and not self._bring(found[0]):
            found = None
        if found is not None and self.host is not None:
            self.host.put(found[0])
        if found is not None and not loading.waiters:
            self.ahead[loading.key] = found[1], found[0].nbytes
        for request, index in loading.waiters.items():
            request.loads.discard(loading.key)
            if found is None:
                request.absent.append(index)
                continue
            request.missing.discard(loading.key)
            self._reused(request, index, found[1])
        return found is not None

    def _bring(self, record: Record) -> bool:
        """Keep a record that was read; False if there is no room for it after all, as on a GPU that others use too."""
        self.memory.make_room(record.nbytes)
        try:
            self.memory.keep(self.pooling.bring(record))
        except RuntimeError as error:  # it is a cache: what can't be brought is computed
            log.warning("a record can't be brought to %s, computing instead: %s", self.model.device, error)
            return False
        return True

    def _encode_absent(self, request: Request, absent: set[str]) -> None:
        """Encode what was in no tier: all of it at once, so that the links of a chain run in one step.

        absent: what others have just been told isn't there. It isn't read again.
        """
        indices, request.absent = request.absent, []
        keys = {request.keys[index] for index in indices}
        request.missing -= keys
        request.resolved -= keys
        self._resolve(request, indices, keys | absent)
        if not request.missing:
            self._ready(request)

    def _stop_waiting(self, request: Request, key: str) -> None:
        loading = self.loading.get(key)
        if loading is not None and loading.waiters.pop(request, None) is not None and not loading.waiters:
            del self.loading[key]
            if self.loader is not None:
                self.loader.cancel(key)

    def _look_ahead(self) -> None:
        """Read what requests will need that wait for memory, as far as it takes a small part of the budget.

        What comes lies in the pool like any record that nobody holds, and may be evicted like one.
        """
        if self.loader is None:
            return
        self.ahead = {key: ahead for key, ahead in self.ahead.items() if key in self.memory.pool}
        taken = sum(nbytes for _, nbytes in self.ahead.values())
        taken += sum(loading.nbytes for loading in self.loading.values() if not loading.waiters)
        for request in self.waiting:
            if request.looked_ahead:
                continue
            for index in sorted(_read(request)):
                key, span = request.keys[index], request.plan.spans[index]
                if not span.cached or key in self.memory.pool or key in self.encodings or key in self.loading:
                    continue
                if self.host is not None and key in self.host:  # it comes at once when it is needed
                    continue
                taken += self.pooling.nbytes(len(span))
                if taken > self.memory.budget // AHEAD:
                    return
                self._load(self.loader, key, len(span), request.salt, ahead=True)
                self.loader.count("ahead")
            request.looked_ahead = True

    def _encoding(self, request: Request, index: int, spare: int) -> Encoding:
        """A span to be encoded. spare: tokens that there is memory for besides what admitted requests may need."""
        spans = request.plan.spans
        link = link_of(request.plan, request.keys, index)
        seen = sum([(p.hi or 0) - p.lo for p in spans[index].sees]) if link else 0
        return Encoding(
            request.keys[index],
            Sequence(spans[index], request.keys, linked=0 < seen <= spare),
            persistent=spans[index].cached,
            order=(request.number, index),
            link=link,
            salt=request.salt,
        )

    def _ready(self, request: Request) -> None:
        """Release intermediate versions once everything the prompt span reads is in the pool."""
        request.usage.encoded = time.perf_counter() - request.submitted
        self.memory.encoded(request)
        wanted = {request.keys[p.span] for p in request.plan.prompt.sees}
        for key in [k for k in request.held if k not in wanted]:
            self.memory.release(request, key)
        request.usage.kv_bytes = self.memory.held_bytes(request, wanted)
        if request.encode_only:
            self._finish(request, "length")


def _unscored(owner: Request | Encoding) -> int:
    """How many of the next tokens need no logits: those before the last one, or before those that predict the answer."""
    if isinstance(owner, Encoding):
        return owner.sequence.left
    first = 0 if owner.echo else len(owner.plan.prompt.tokens) - max(1, len(owner.answer))
    return max(0, first - owner.sequence.done)


def _read(request: Request) -> set[int]:
    """The spans that the prompt span reads."""
    return {place.span for place in request.plan.prompt.sees}


def _check_selected(plan: Plan, selection: Selection) -> None:
    """Raise PlanError if a plan reads a part of a span that has lost tokens, or stands between its tokens."""
    for reader in plan.spans:
        for place in reader.sees:
            source = plan.spans[place.span]
            if not source.cached or kept_tokens(selection, len(source)) == len(source):
                continue
            whole = place.lo == 0 and place.hi == len(source) and not reader.groups
            if not whole or place.at + source.positions[-1] - source.start >= reader.start:
                raise PlanError(
                    f"selection {selection.name} leaves out tokens of {source.name or 'a span'}, but this plan reads a "
                    "part of it, or from between its tokens; use another method, or no selection"
                )
