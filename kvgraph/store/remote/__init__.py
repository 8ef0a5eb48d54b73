"""Tiers on other machines, chosen by a URL's scheme; one module per kind. See `kvgraph.store.remote.base.Remote`."""
