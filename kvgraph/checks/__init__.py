"""Checks of a model and a method: the gate (does the model compose exactly?) and quality (what does a method cost?)."""
