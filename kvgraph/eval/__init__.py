"""Evaluation: any task, by any method, on any model, through the real engine. See `kvgraph.eval.run`."""
