"""Tiers on other machines: one kind a file, chosen by a URL's scheme. See `kvgraph.store.remote.base.Remote`."""
