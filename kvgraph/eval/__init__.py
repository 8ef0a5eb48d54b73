"""Evaluation of any task, method and model, through the real engine. See `kvgraph.eval.run`."""
