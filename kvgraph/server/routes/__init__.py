"""The HTTP routes, one file a group. None imports another."""
