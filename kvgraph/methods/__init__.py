"""Methods: pure functions from graphs to plans, one file each. docs/extending.md says how to add one."""

from kvgraph.methods.ape import APE
from kvgraph.methods.base import Method
from kvgraph.methods.block import Block
from kvgraph.methods.cacheblend import CacheBlend
from kvgraph.methods.epic import Epic
from kvgraph.methods.full import Full
from kvgraph.methods.graph_kv import GraphKV
from kvgraph.methods.kvlink import KVLink
from kvgraph.methods.pcw import PCW
from kvgraph.methods.prompt_cache import PromptCache
from kvgraph.methods.registry import BASELINE, METHODS, PRESETS, configuration, get, with_fields
from kvgraph.methods.spec import format, parse, resolve

__all__ = [
    "APE",
    "BASELINE",
    "METHODS",
    "PCW",
    "PRESETS",
    "Block",
    "CacheBlend",
    "Epic",
    "Full",
    "GraphKV",
    "KVLink",
    "Method",
    "PromptCache",
    "configuration",
    "format",
    "get",
    "parse",
    "resolve",
    "with_fields",
]
