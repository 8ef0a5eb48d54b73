"""More than one machine: which replica a request goes to, and encoding and serving on Ray."""

from __future__ import annotations

from typing import Any


def app(settings: dict[str, Any]) -> Any:
    """The application for `serve run kvgraph.cluster:app` and its configuration file; needs kvgraph[ray].

    settings: those of `kvgraph serve`, and `replicas`.
    """
    from kvgraph.cluster.serving import application

    return application(settings)
