"""Which tokens of a span are kept, for every layer and head. See `kvgraph.store.selection.base.Selection`."""
