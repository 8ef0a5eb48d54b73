"""The disk tier: records as files, an index beside them."""

from kvgraph.store.disk.store import LIBRARY, OWN_FILES, STORE_FORMAT, SUFFIX, DiskStore, Stat, VerifyReport

__all__ = ["LIBRARY", "OWN_FILES", "STORE_FORMAT", "SUFFIX", "DiskStore", "Stat", "VerifyReport"]
