"""Checks of a model and a method: the gate (does it compose exactly?) and quality (what does a method cost?)."""
