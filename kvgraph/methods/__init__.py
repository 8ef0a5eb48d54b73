"""Methods: pure functions from graphs to plans, one file each. To add one, add a file and a line in METHODS."""

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
from kvgraph.methods.registry import METHODS, PRESETS, get, reads_edges
from kvgraph.methods.spec import parse

__all__ = [
    "APE",
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
    "get",
    "parse",
    "reads_edges",
]
