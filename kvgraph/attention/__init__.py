"""Attention over stored spans: rotation, the rows of a step, and one backend function for each kind of device."""
