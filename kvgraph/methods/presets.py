"""Configured methods. Each function's docstring says what it reproduces."""

from __future__ import annotations

from kvgraph.methods.graph_kv import GraphKV
from kvgraph.methods.kvlink import KVLink


def graph_kv_rag(drop_token: int | None = None) -> GraphKV:
    """Graph-KV's `gapemp`: give the graph all_pairs(n, self_edges=True); drop_token is the tokenizer's pad (= eos)."""
    return GraphKV(keep="all", layout="packed", drop_token=drop_token)


def graph_kv_rag_top_k(drop_token: int | None = None) -> GraphKV:
    """Graph-KV's `gapemp_appr`: as `gapemp`, with a graph of top_k(n, k, self_edges=True, last=True)."""
    return graph_kv_rag(drop_token)


def graph_kv_ego() -> GraphKV:
    """Graph-KV's `gapemp_graph` and `gapemp_graph_batch`: give the graph ego([(center, neighbours), ...])."""
    return GraphKV(layout="tight")


def kvlink_llama3_0() -> KVLink:
    """KVLink0 for Llama 3: the released checkpoint without link tokens."""
    return KVLink(links=0, mem_start=128254, mem_end=128255)


def kvlink_llama3_1() -> KVLink:
    """KVLink1 for Llama 3: one link token per document; reserved token ids from 128011."""
    return KVLink(links=1, link_start=128011, slots=40, mem_start=128254, mem_end=128255)


def kvlink_llama3_5() -> KVLink:
    """KVLink5 for Llama 3: five link tokens per document; reserved token ids from 128011."""
    return KVLink(links=5, link_start=128011, slots=40, mem_start=128254, mem_end=128255)
