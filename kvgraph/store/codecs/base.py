"""What a codec does: turn a record's KV into named tensors that are written, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from kvgraph.store.record import Record

KV = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # keys and values, a tensor [G, N, D] a layer each


class TensorInfo(NamedTuple):
    """A tensor as a header describes it: dtype code (see `kvgraph.store.format.DTYPES`), shape, first byte of its data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


class Codec(Protocol):
    """A frozen dataclass whose fields are its whole configuration. It holds no state: any thread may use it.

    name: in the registry. lossless: whether `unpack` gives back every bit that `pack` was given.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    def pack(self, record: Record) -> dict[str, Tensor]:
        """The KV of a record as named tensors on the CPU, in the order in which they are written."""
        ...

    def check(self, tensors: Mapping[str, TensorInfo], tokens: int) -> None:
        """Raise BadRecord unless `unpack` can read these tensors as the KV of so many tokens. They may be anybody's."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], tokens: int) -> KV:
        """The KV in tensors that passed `check`."""
        ...
