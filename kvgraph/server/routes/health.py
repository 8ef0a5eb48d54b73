"""Health: whether the process lives, and whether it can answer."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from kvgraph.server import errors
from kvgraph.server.errors import APIError
from kvgraph.server.state import TheServer

router = APIRouter(responses={503: errors.DECLARED[503]})


class Status(BaseModel):
    """The state of the server."""

    status: str


@router.get("/health")
async def health(server: TheServer) -> Status:
    """The process answers; 503 once its engine has failed for good."""
    if server.failed is not None:
        raise APIError(503, f"the engine failed: {server.failed!r}", code="failed")
    return Status(status="alive")


@router.get("/ready")
async def ready(server: TheServer) -> Status:
    """The model is loaded, has passed its gate, and takes requests; 503 before, and while shutting down."""
    if not server.ready:
        raise APIError(
            503, "the model is being loaded, or the server is shutting down", code="not_ready", retry_after=2
        )
    return Status(status="ready")
