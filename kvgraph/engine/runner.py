"""Running rows through the model: one packed forward, on a CPU or a GPU.

On a GPU, steps of few tokens (decoding, short questions) are CUDA graphs, one for each power of two of tokens, captured
when first needed. Replaying a graph takes one upload, the step's tables, and nothing in it waits for the device. While the same
rows decode, the upload is only what differs from the step before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvgraph.attention.rows import Row, arrivals_of
from kvgraph.attention.step import Step
from kvgraph.models import Model

log = logging.getLogger("kvgraph.engine")

GRAPH_TOKENS = 64  # steps of at most this many tokens run as CUDA graphs
UPLOADS = 4  # steps whose uploads may be in progress


class Runner:
    """Runs rows with the attention of `kvgraph.attention.step`, on any device."""

    def __init__(self, model: Model):
        self.model = model

    def run(self, rows: Sequence[Row], want: Sequence[int]) -> Tensor:
        """One forward of all rows, packed. Returns the logits [n, V] float32 of the packed tokens `want`.

        They are valid until the next call. The rows aren't committed.
        """
        for arrival in arrivals_of(rows):
            arrival.wait()
        step = Step(rows, self.model.layers, self.model.rotaries, self.model.device)
        wanted = torch.tensor(want, dtype=torch.int64, device=self.model.device)
        return self.model.forward(step.tokens, step.positions, step, wanted)


class CudaRunner(Runner):
    """Runs rows with Triton kernels; see `kvgraph.attention.cuda`."""

    def __init__(self, model: Model):
        from kvgraph.models.fused import Fused

        super().__init__(model)
        self._fused = Fused(model.hf)
        self._device = model.device if model.device.type == "cuda" else -1  # Triton's interpreter runs on a CPU
        self.rotaries = tuple(replace(r, inv_freq=r.inv_freq.to(model.device)) for r in model.rotaries)
        self._graphs: dict[tuple[int, Any], Any] = {}
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._pool: Any = None
        self._partial: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._capturable = True
        self._decoding: Any = None  # the last replayed step as a `Decoding`, with its graph and logits, if it can go on

    def run(self, rows: Sequence[Row], want: Sequence[int]) -> Tensor:
        """See `Runner.run`."""
        with torch.cuda.device(self._device):
            return self._run(rows, want)

    def _run(self, rows: Sequence[Row], want: Sequence[int]) -> Tensor:
        from kvgraph.attention.cuda import CudaStep

        if self._decoding is not None and len(rows) <= GRAPH_TOKENS and self._decoding[0].continues(rows, want):
            return self._decode(rows)
        step = CudaStep(rows, want, self.model.layers, self.rotaries, self.model.device, self.model.heads)
        # What is still arriving is waited for layer by layer, which a graph can't; the copies take longer than the launches.
        if self._capturable and step.size <= GRAPH_TOKENS and not step.flags.masked and not step.arrivals:
            logits = self._replay(step)
            if logits is not None:
                return logits
        staging, event = self._upload_buffer(step.length)
        tables, attention = step.on_device(staging)
        event.record()
        return self._forward(tables, attention)

    def _forward(self, tables: Any, attention: Any) -> Tensor:
        """The model's forward of a step, with fused kernels where they give the same results."""
        with self._fused.used():
            return self.model.forward(tables.tokens, tables.positions, attention, tables.want)

    def _replay(self, step: Any) -> Tensor | None:
        """The logits of a step by its CUDA graph; None if it fits none or the model can't be captured."""
        from kvgraph.attention.cuda import fixed_sizes
        from kvgraph.attention.decoding import Decoding, continuable

        size = 1 << (step.size - 1).bit_length()
        flags = step.flags._replace(large=size * self.model.heads // self.model.layers[0].kv_heads > 16, merges=True)
        sizes = fixed_sizes(size, GRAPH_TOKENS)
        if not sizes.holds(step.sizes) or (step.flags.large and not flags.large):
            return None
        key = (size, flags)
        if key not in self._graphs:
            self._graphs[key] = self._captured(step, sizes, flags)
        if self._graphs[key] is None:
            return None
        tables, graph, logits = self._graphs[key]
        staging, event = self._upload_buffer(tables.layout.end)
        self._decoding = None  # an interrupt from here on must not leave one whose tables hold another step
        tables.fill(step, staging)
        event.record()
        graph.replay()
        found: Tensor = logits[: len(step.want)]
        self._decoding = (Decoding(step, tables, staging), graph, found) if continuable(step) else None
        return found

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """The logits of a step that continues the last replayed one."""
        decoding, graph, logits = self._decoding
        staging, event = self._upload_buffer(decoding.length)
        decoding.advance(rows, staging)
        event.record()
        graph.replay()
        found: Tensor = logits
        return found

    def _captured(self, step: Any, sizes: Any, flags: Any) -> Any:
        """(tables, graph, logits) of one size of step; None if the model's forward can't be captured."""
        from kvgraph.attention.cuda import Attention, Tables

        model = self.model
        tables = Tables(model.device, sizes, step.windows, flags.groups, step.scratch(sizes.tokens))
        staging, event = self._upload_buffer(tables.layout.end)
        tables.fill(step, staging)
        event.record()

        def forward() -> Tensor:
            attention = Attention(tables, flags, model.layers, self.rotaries, step.tune, self._partial)
            return self._forward(tables, attention)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles the kernels, and lets libraries allocate what they keep
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may ask for memory meanwhile, for records that they read or write.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = forward()
        except RuntimeError as error:  # a model whose forward depends on data, such as some routers
            log.warning("%s can't run as CUDA graphs; decoding will be slower: %s", model.name, error)
            self._capturable = False
            return None
        self._pool = self._pool or graph.pool()
        return tables, graph, logits

    def _upload_buffer(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """Pinned memory of at least `size` int64 that no upload reads, and the event to record after its own upload."""
        staging, event = self._staging.pop(0) if len(self._staging) >= UPLOADS else (None, _event())
        event.synchronize()
        if staging is None or len(staging) < size:
            staging = torch.empty(max(size, 1 << 15), dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self._staging.append((staging, event))
        return staging, event


def runner_for(model: Model) -> Runner:
    """The fastest exact way to run a model on its device."""
    uniform = len({(x.kv_heads, x.key_dim % 8, x.value_dim % 8) for x in model.layers}) == 1
    if model.device.type == "cuda" and torch.version.cuda and find_spec("triton") and uniform:
        return CudaRunner(model)
    return Runner(model)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
