"""How a record's KV become the tensors of a file: one codec a file. See `kvgraph.store.codecs.base.Codec`."""
