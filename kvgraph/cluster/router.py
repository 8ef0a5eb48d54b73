"""Ray Serve's request router that asks `kvgraph.cluster.routing`.

Ray copies this file's class into the processes that route, with all that it refers to. So it refers to a module, which
isn't copied but imported.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from kvgraph.cluster import routes


class SpanRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Sends a call to the replica that most likely has most of its spans, as its arguments `ticket` and `spans` say.

    A call with an argument `replica` goes there.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have joined or left."""
        super().update_replicas(replicas)
        routes.ROUTES.members(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """A replica was found dead by a call to it."""
        super().on_replica_actor_died(replica_id)
        routes.ROUTES.lost(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a call; the others are for when that one takes no more calls."""
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none takes it, wait before this is called again
        asked = pending_request.kwargs
        chosen = asked.get("replica")
        if "ticket" in asked:
            chosen = routes.ROUTES.take(asked["ticket"], asked["spans"])
        if chosen not in there:
            return [candidate_replicas]
        return [[there[chosen]], [replica for name, replica in there.items() if name != chosen]]
