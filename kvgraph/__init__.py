"""kvgraph: encode every text segment into a KV cache once, and compose those caches along a graph.

The public names below are imported when first used, so that graphs, plans and stores work without loading a model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvgraph.engine.engine import Encoded, Engine
    from kvgraph.engine.result import Chunk, Result, Usage
    from kvgraph.engine.sampling import SamplingParams
    from kvgraph.errors import CapacityError, GraphError, KVGraphError, ModelError, PlanError, StoreError
    from kvgraph.graph import ContextGraph
    from kvgraph.plan import Place, Plan, Span

__version__ = "0.1.0"

_HOMES = {
    "Engine": "kvgraph.engine.engine",
    "Encoded": "kvgraph.engine.engine",
    "Chunk": "kvgraph.engine.result",
    "Result": "kvgraph.engine.result",
    "Usage": "kvgraph.engine.result",
    "SamplingParams": "kvgraph.engine.sampling",
    "CapacityError": "kvgraph.errors",
    "GraphError": "kvgraph.errors",
    "KVGraphError": "kvgraph.errors",
    "ModelError": "kvgraph.errors",
    "PlanError": "kvgraph.errors",
    "StoreError": "kvgraph.errors",
    "ContextGraph": "kvgraph.graph",
    "Place": "kvgraph.plan",
    "Plan": "kvgraph.plan",
    "Span": "kvgraph.plan",
}

__all__ = [
    "CapacityError",
    "Chunk",
    "ContextGraph",
    "Encoded",
    "Engine",
    "GraphError",
    "KVGraphError",
    "ModelError",
    "Place",
    "Plan",
    "PlanError",
    "Result",
    "SamplingParams",
    "Span",
    "StoreError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvgraph' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
