"""Records on their way between a GPU and host memory, by copies on streams of their own, beside the steps.

The host's side is pinned memory, laid out as a `RowKV`. Records that came together are copied layer by layer, first all of
them layer 0, then layer 1, ... A step that reads them waits before each layer's attention for that layer alone, and it is
the device that waits, not the host. So the copies take their time beside the model's other work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kvgraph.attention.rows import RowKV, View, copied, flat, shapes_of
from kvgraph.store.record import Arriving, Record

COPIES = 512  # of one arrival, at most about: a stream takes about 1,000 before the host waits for it
LEAST = 1 << 20  # bytes of a copy, on average at least, or the host's calls would take longer than the copies
Pair = tuple[Tensor, Tensor]  # where to copy, and what


class Event(Protocol):
    """A point in a stream's work, as `torch.cuda.Event`."""

    def wait(self) -> None:
        """What the device is given from now on runs after it. The host doesn't wait."""
        ...

    def query(self) -> bool:
        """Whether the stream is past it."""
        ...

    def synchronize(self) -> None:
        """The host waits for it."""
        ...


class CopyStream(Protocol):
    """Copies beside the device's main work, in order."""

    def follow(self) -> None:
        """What is copied from now on is copied after all that the device has been given so far."""
        ...

    def hold(self, tensor: Tensor) -> None:
        """Once the device's tensor is freed, its memory isn't used again before the copies given so far are done."""
        ...

    def copy(self, pairs: Iterable[Pair]) -> Event:
        """Begin to copy each, one after the other; the event of the last."""
        ...


class CudaStream:
    """A stream of a GPU. Memory from torch's pinned allocator stays as it is until copies from or to it are done."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def follow(self) -> None:
        """See `CopyStream`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def hold(self, tensor: Tensor) -> None:
        """See `CopyStream`."""
        tensor.record_stream(self._stream)

    def copy(self, pairs: Iterable[Pair]) -> Event:
        """See `CopyStream`."""
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event.record(self._stream)  # type: ignore[attr-defined]  # it is torch's
        return event


class Arrival:
    """Records that are copied to a device together, layer by layer; see `kvgraph.store.record.Arriving`.

    The copies begin with the first wait, or with `begin`: a step uploads its tables before that, as a device copies what it
    is given first. sizes: numbers of a token's keys and values, by layer.
    """

    def __init__(self, stream: CopyStream, sizes: Sequence[int]):
        self._stream, self._prefix = stream, [0, *accumulate(sizes)]
        self._records: list[tuple[Tensor, Tensor, int]] = []  # (on the device, on the host, tokens), until it has begun
        self._sources: list[Tensor] = []  # from then on, until it is done
        self._events: list[Event] = []  # one for so many layers:
        self._layers = 1
        self._done = False

    @property
    def begun(self) -> bool:
        """Whether its copies have been given to the stream; then no record is added."""
        return self._done or bool(self._events)

    @property
    def done(self) -> bool:
        """See `Arriving`."""
        if self._events and self._events[-1].query():
            self._done, self._events, self._sources = True, [], []
        return self._done

    def add(self, target: Tensor, source: Tensor, tokens: int) -> None:
        """Copy one more record's numbers, from pinned memory, to memory that the device has just given."""
        self._stream.follow()  # the work that used the memory before
        self._stream.hold(target)
        self._records.append((target, source, tokens))

    @torch.inference_mode()
    def begin(self) -> None:
        """Begin to copy. Idempotent; after an error nothing has begun, and all is copied the next time."""
        if self.begun:
            return
        layers, events = self._at_once(), []
        last = len(self._prefix) - 1
        for layer in range(0, last, layers):
            lo, hi = self._prefix[layer], self._prefix[min(last, layer + layers)]
            pairs = [(to[n * lo : n * hi], source[n * lo : n * hi]) for to, source, n in self._records]
            events.append(self._stream.copy(pairs))
        self._events, self._layers = events, layers
        self._sources, self._records = [source for _, source, _ in self._records], []

    def wait(self, layer: int | None = None) -> None:
        """See `Arriving`."""
        self.begin()
        if self._events:
            self._events[-1 if layer is None else layer // self._layers].wait()

    def _at_once(self) -> int:
        """How many layers one copy of a record holds."""
        layers = len(self._prefix) - 1
        copies = layers * len(self._records)
        nbytes = sum(source.numel() * source.element_size() for _, source, _ in self._records)
        return min(layers, max(1, -(-copies // COPIES), -(-LEAST * copies // nbytes)))


class Transfers:
    """Copies of records to a device and from it. `bring`, `begin` and `on_the_way` are called under the engine's lock,
    `pinned` and `on_host` by any thread, which they may keep waiting.

    shapes: (kv heads, key dim, value dim) of every layer. incoming, outgoing: None for streams of the device's own.
    """

    def __init__(
        self,
        device: torch.device,
        shapes: Sequence[tuple[int, int, int]],
        incoming: CopyStream | None = None,
        outgoing: CopyStream | None = None,
    ):
        self.device, self._sizes = device, [heads * (key + value) for heads, key, value in shapes]
        self._incoming = incoming or CudaStream(device)
        self._outgoing = outgoing or CudaStream(device)
        self._arrivals: list[Arrival] = []  # those that may not be done; the last one may still take records

    def pinned(self, record: Record) -> Record:
        """A record that `bring` takes, made of one in the host's memory: its KV are unpacked, in one pinned buffer.

        A record that already lies like this isn't copied.
        """
        whole = flat(record)
        if whole is not None and whole.is_pinned():
            return replace(record, packed=None)
        return replace(copied(record, self._buffer(record)), packed=None)

    def bring(self, record: Record) -> Record:
        """The record on the device, where its numbers arrive by and by; see `Record.arrival`. record: of `pinned`."""
        source = flat(record)
        assert source is not None, "what is brought is one buffer"
        kv = RowKV(shapes_of(record), record.held, record.keys[0].dtype, self.device)
        if not self._arrivals or self._arrivals[-1].begun:
            self._arrivals = [arrival for arrival in self._arrivals if not arrival.done]
            self._arrivals.append(Arrival(self._incoming, self._sizes))
        self._arrivals[-1].add(kv.buffer, source, record.held)
        return replace(record, keys=kv.keys, values=kv.values, arrival=self._arrivals[-1])

    def begin(self) -> None:
        """Begin to copy what no step has asked for, and let go of what has arrived. Once a step, after its uploads."""
        for arrival in self._arrivals[-1:]:  # those before it have begun
            arrival.begin()
        self._arrivals = [arrival for arrival in self._arrivals if not arrival.done]

    def on_the_way(self, views: Sequence[View]) -> list[Arriving]:
        """What of the views' records may not be there yet."""
        if not self._arrivals:
            return []
        records = [view.source for view in views if isinstance(view.source, Record)]
        found = {id(record.arrival): record.arrival for record in records if record.arrival is not None}
        return [arrival for arrival in found.values() if not arrival.done]

    def on_host(self, record: Record) -> Record:
        """A computed record's copy in one pinned buffer of the host, once it is there. Steps go on meanwhile."""
        kv, whole = self._buffer(record), flat(record)
        pairs = [(kv.buffer, whole)] if whole is not None else []
        if whole is None:
            pairs = list(zip((*kv.keys, *kv.values), (*record.keys, *record.values), strict=True))
        packed = record.packed
        if packed is not None:
            packed = replace(packed, tensors={name: t.cpu() for name, t in packed.tensors.items()})
        self._outgoing.follow()
        self._outgoing.copy(pairs).synchronize()
        return replace(record, keys=kv.keys, values=kv.values, packed=packed)

    @staticmethod
    def bytes(size: int) -> Tensor:
        """Pinned memory to read a record's file into, [size] uint8. torch keeps what is freed, and gives it out again."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    @staticmethod
    def _buffer(record: Record) -> RowKV:
        host, pins = torch.device("cpu"), torch.cuda.is_available()
        return RowKV(shapes_of(record), record.held, record.keys[0].dtype, host, pinned=pins)
