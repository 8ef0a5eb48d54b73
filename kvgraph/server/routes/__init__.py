"""The HTTP routes, one module per group. None imports another."""
