"""Codecs, which turn a record's KV into a file's tensors; one module each. See `kvgraph.store.codecs.base.Codec`."""
