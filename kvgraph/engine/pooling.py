"""How the engine's memory keeps the records of stored spans, and how many bytes they take there.

On CPUs, attention reads records of some codecs as they are packed (see `kvgraph.store.codecs.registry.in_place`). Any other
record is unpacked once, when it is computed or read. A GPU's memory is filled by copies beside the steps
(`kvgraph.engine.transfers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvgraph.attention.rows import View, on_device
from kvgraph.engine.transfers import Transfers
from kvgraph.models import Model
from kvgraph.store.codecs.base import Codec
from kvgraph.store.codecs.registry import in_place, reads_in_place
from kvgraph.store.codecs.zstd import Zstd
from kvgraph.store.record import Arriving, Record
from kvgraph.store.selection.base import Selection, kept_tokens


class Pooling:
    """The form of records in memory, for one model, codec and selection, and how they get there.

    transfers: copies between a GPU and the host; None where memory is the host's own.
    """

    def __init__(self, model: Model, codec: Codec, selection: Selection | None):
        self._device, self._per_token, self._selection = model.device, model.kv_bytes_per_token, selection
        self._packs: Codec | None = None
        if model.device.type == "cpu" and reads_in_place(codec):
            self._packs = codec.over if isinstance(codec, Zstd) else codec
        self._shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
        self._dtype = model.dtype
        self._sizes: dict[int, int] = {}  # by tokens
        self.transfers = Transfers(model.device, self._shapes) if model.device.type == "cuda" else None

    def of(self, record: Record) -> Record:
        """The record, just computed, as memory keeps it."""
        if self._packs is None:
            return on_device(replace(record, packed=None), self._device)
        return in_place(record)

    def read(self, record: Record) -> Record:
        """What a thread that reads records from a store makes of one, for `bring`."""
        return self.of(record) if self.transfers is None else self.transfers.pinned(record)

    def bring(self, record: Record) -> Record:
        """A record that was read, as memory keeps it. It may still be on its way there."""
        return record if self.transfers is None else self.transfers.bring(record)

    def begin(self) -> None:
        """Have what is to be brought copied now, if no step has asked for it."""
        if self.transfers is not None:
            self.transfers.begin()

    def on_the_way(self, views: Sequence[View]) -> Sequence[Arriving]:
        """What of the views' records may still be on its way."""
        return () if self.transfers is None else self.transfers.on_the_way(views)

    def on_host(self, record: Record) -> Record:
        """A computed record in the host's memory."""
        if self.transfers is not None:
            return self.transfers.on_host(record)
        return on_device(record, torch.device("cpu"))

    def nbytes(self, tokens: int) -> int:
        """Bytes in memory of the record of a span of so many tokens."""
        held = tokens if self._selection is None else kept_tokens(self._selection, tokens)
        if self._packs is None:
            return held * self._per_token
        if held not in self._sizes:
            self._sizes[held] = self._packed_size(self._packs, held)
        return self._sizes[held]

    def _packed_size(self, codec: Codec, held: int) -> int:
        """Packing tensors without numbers tells the sizes of what comes out."""
        sizes = {}
        for heads, key, value in set(self._shapes):
            kv = [torch.empty(heads, held, size, dtype=self._dtype, device="meta") for size in (key, value)]
            packed = codec.pack(Record("", (kv[0],), (kv[1],), torch.arange(held)))
            sizes[heads, key, value] = sum(t.numel() * t.element_size() for t in packed.values())
        return sum(sizes[shape] for shape in self._shapes)
