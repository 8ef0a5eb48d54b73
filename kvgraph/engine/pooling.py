"""How the engine's memory keeps the records of stored spans, and how many bytes they take there.

On CPUs, attention reads records of some codecs as they are packed (see `kvgraph.store.codecs.registry.in_place`). Any other
record is unpacked once, when it is computed or read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvgraph.attention.rows import on_device
from kvgraph.models import Model
from kvgraph.store.codecs.base import Codec
from kvgraph.store.codecs.registry import in_place, reads_in_place
from kvgraph.store.codecs.zstd import Zstd
from kvgraph.store.record import Record
from kvgraph.store.selection.base import Selection, kept_tokens


class Pooling:
    """The form of records in memory, for one model, codec and selection."""

    def __init__(self, model: Model, codec: Codec, selection: Selection | None):
        self._device, self._per_token, self._selection = model.device, model.kv_bytes_per_token, selection
        self._packs: Codec | None = None
        if model.device.type == "cpu" and reads_in_place(codec):
            self._packs = codec.over if isinstance(codec, Zstd) else codec
        self._shapes = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in model.layers]
        self._dtype = model.dtype
        self._sizes: dict[int, int] = {}  # by tokens

    def of(self, record: Record) -> Record:
        """The record as memory keeps it."""
        if self._packs is None:
            return on_device(replace(record, packed=None), self._device)
        return in_place(record)

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
