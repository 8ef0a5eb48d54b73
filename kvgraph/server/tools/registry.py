"""The formats of calls by name."""

from __future__ import annotations

from kvgraph.registry import Registry, named
from kvgraph.server.tools.base import ToolFormat
from kvgraph.server.tools.hermes import Hermes
from kvgraph.server.tools.llama import LlamaJSON
from kvgraph.server.tools.mistral import Mistral, MistralArgs

FORMATS: Registry[ToolFormat] = Registry(
    {form.name: form for form in (Hermes(), Mistral(), MistralArgs(), LlamaJSON())},
    "kvgraph.tool_formats",
    named(ToolFormat),
)
"""Formats by name. Other packages add some in the group "kvgraph.tool_formats"; see `kvgraph.registry`."""


def format_of(written: str) -> ToolFormat | None:
    """The format of a call as a chat template rendered it; None if there is none that knows it."""
    return next((form for form in FORMATS.values() if form.writes(written)), None)
