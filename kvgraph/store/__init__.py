"""Where records live: content-addressed tiers behind one interface. See `kvgraph.store.base.Store`."""

from kvgraph.store.base import Found, Store
from kvgraph.store.disk import DiskStore
from kvgraph.store.memory import MemoryStore
from kvgraph.store.open import open_store
from kvgraph.store.record import Record
from kvgraph.store.tiered import TieredStore

__all__ = ["DiskStore", "Found", "MemoryStore", "Record", "Store", "TieredStore", "open_store"]
