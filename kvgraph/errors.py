"""The errors kvgraph raises on purpose. Each is one clear line that says what to do. Any other exception is a bug."""


class KVGraphError(Exception):
    """Base of every error a user can cause. The CLI prints its message without a traceback."""


class GraphError(KVGraphError, ValueError):
    """A ContextGraph, an edge or a method's field is wrong: unknown segment, empty query, too many link slots, ..."""


class PlanError(KVGraphError, ValueError):
    """A plan breaks a rule of `kvgraph.plan` or doesn't fit the model (a position at or above its limit)."""


class ModelError(KVGraphError, RuntimeError):
    """A model can't be loaded or isn't supported; the message gives the reason."""


class CapacityError(KVGraphError, RuntimeError):
    """A request can never fit the engine's KV budget; the message gives the bytes it would need."""


class StoreError(KVGraphError, RuntimeError):
    """A store can't be opened or written (permissions, another format version, a full disk)."""
