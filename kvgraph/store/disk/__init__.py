"""The disk tier: records as files, an index beside them."""

from kvgraph.store.disk.store import STORE_FORMAT, SUFFIX, DiskStore, Stat

__all__ = ["STORE_FORMAT", "SUFFIX", "DiskStore", "Stat"]
