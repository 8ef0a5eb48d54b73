"""Oracle cases: what the published Graph-KV and KVLink code computes, each as a (method, graph of token ids).

The folder is $KVGRAPH_ORACLE, else ../shared/oracle beside the repository, else the small copy in tests/data. It holds
models/<name>/ (config.json, model.safetensors) and golden/<method>.{json,safetensors}.

Also a dense float32 Llama in numpy, written for these tests alone: it shares no code with the engine.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from kvgraph.edges import all_pairs, ego, top_k
from kvgraph.graph import ContextGraph
from kvgraph.methods import Block, Full, KVLink, Method, get
from kvgraph.plan import Plan

Case = dict[str, Any]


def folder() -> Path:
    """The oracle folder in use."""
    here = Path(__file__).resolve().parents[1]
    if given := os.environ.get("KVGRAPH_ORACLE"):
        return Path(given)
    beside = here.parent.parent / "shared" / "oracle"
    return beside if beside.is_dir() else here / "data" / "oracle_small"


def cases() -> list[Case]:
    """All cases of the folder, without their bulky dense form."""
    found = []
    for path in sorted((folder() / "golden").glob("*.json")):
        for case in json.loads(path.read_text()):
            case.pop("dense", None)
            found.append({**case, "file": path.stem})
    return found


def model_folder(case: Case) -> Path:
    """The folder of the model the case was recorded with."""
    return folder() / "models" / case["model"]


def first_logits(case: Case) -> np.ndarray:
    """Logits of the first generated token, [vocab] float32."""
    return _tensors(folder() / "golden" / f"{case['file']}.safetensors")[f"{case['id']}/first_logits"]


def kv_cache(case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys (rotated) and values the original held before the query, [layers, kv heads, slots, D], where recorded."""
    tensors = _tensors(folder() / "golden" / f"{case['file']}.safetensors")
    names = [f"{case['id']}/cache_{x}" for x in "kv"]
    return (tensors[names[0]], tensors[names[1]]) if names[0] in tensors else None


@cache
def _tensors(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


def problem(case: Case) -> tuple[Method, ContextGraph]:
    """The case as a method and a graph of token ids."""
    kind, ids = case["method"], case["ids"]
    if kind == "vanilla":
        return Full(), ContextGraph([], ids["prompt"])
    if kind in ("block_parallel", "block_batch", "block_server"):
        return Block(), ContextGraph(ids["blocks"][1:], ids["query"], ids["blocks"][0] if ids["blocks"] else [])
    if kind in ("gapemp", "gapemp_appr"):
        n = len(ids["docs"])
        if kind == "gapemp":
            method, edges = get("graph-kv-rag", drop_token=case["pad_id"]), all_pairs(n, self_edges=True)
        else:
            method = get("graph-kv-rag-top-k", drop_token=case["pad_id"])
            edges = top_k(n, case["inputs"]["top_k"], self_edges=True, last=True)
        return method, ContextGraph(ids["docs"], ids["query"], ids["prefix"], edges)
    if kind in ("gapemp_graph", "gapemp_graph_batch"):
        segments: list[list[int]] = []
        groups = []
        for group in ids["groups"]:
            neighbours = range(len(segments), len(segments) + len(group["neighbors"]))
            segments += [*group["neighbors"], group["center"]]
            groups.append((len(segments) - 1, neighbours))
        return get("graph-kv-ego"), ContextGraph(segments, ids["query"], ids["prefix"], ego(groups))
    if kind == "kvlink":
        return _kvlink(case)
    raise KeyError(f"no method for the oracle's {kind!r}")


def _kvlink(case: Case) -> tuple[Method, ContextGraph]:
    """Cut the flat prompt by its segment ids (0: everything but documents) into prefix, documents, links and query."""
    ids, links, link_start = case["ids"], case["inputs"]["reencode_num"], case["link_start"]
    tagged = zip(ids["segment_ids"], ids["input_ids"], strict=True)
    runs = [(tag, [token for _, token in run]) for tag, run in groupby(tagged, key=lambda pair: pair[0])]
    prefix, documents = runs[0][1], [run for tag, run in runs if tag]
    rest = [token for tag, run in runs[1:] if not tag for token in run]
    total = links * len(documents)
    assert prefix[-1] == case["mem_start"] and rest[total] == case["mem_end"]
    assert rest[:total] == list(range(link_start, link_start + total))
    query = rest[total + 1 :] + ids["generation_prompt"]
    if case["inputs"]["attn_type"] == "standard":
        joined = [document + rest[links * i : links * (i + 1)] for i, document in enumerate(documents)]
        return Full(), ContextGraph(joined, [case["mem_end"], *query], prefix)
    method = KVLink(links, link_start, mem_start=case["mem_start"], mem_end=case["mem_end"])
    return method, ContextGraph(documents, query, prefix[:-1])


@dataclass
class DenseLlama:
    """A Llama over explicit (tokens, positions, visibility). Shapes: T rows, N columns, H heads, G KV heads, D size."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    frequencies: np.ndarray  # [D / 2] float64

    @staticmethod
    @cache
    def load(path: Path) -> DenseLlama:
        config = json.loads((path / "config.json").read_text())
        weights = {k: v.astype(np.float32) for k, v in load_file(path / "model.safetensors").items()}
        return DenseLlama(config, weights, _frequencies(config))

    def greedy(self, plan: Plan, n: int) -> tuple[np.ndarray, list[int]]:
        """(first-step logits [vocab], n greedy tokens, whatever the end token) continuing from the plan's prompt span.

        Needs everything the prompt span sees to lie below its last position, as in all oracle cases.
        """
        dense = plan.dense()
        at = plan.prompt.positions[-1]
        assert dense.positions.max() == at
        past: list[tuple[np.ndarray, np.ndarray]] = []
        logits = first = self.forward(dense.tokens, dense.positions, dense.visible, past)
        seen, tokens = dense.visible[-1], []
        while len(tokens) < n - 1:
            tokens.append(int(logits.argmax()))
            at, seen = at + 1, np.append(seen, True)
            logits = self.forward(np.array(tokens[-1:]), np.array([at]), seen[None], past)
        return first, [*tokens, int(logits.argmax())]

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray, past: list[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Logits of the last row. visible [T, N], N counting the past; `past` (keys, values a layer) grows in place."""
        c, w = self.config, self.weights
        d = c["head_dim"]
        angles = positions[:, None] * self.frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        def heads(x: np.ndarray) -> np.ndarray:  # [T, heads * D] -> [heads, T, D]
            return x.reshape(len(x), -1, d).swapaxes(0, 1)

        def rotate(x: np.ndarray) -> np.ndarray:
            a, b = x[..., : d // 2], x[..., d // 2 :]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        def norm(x: np.ndarray, name: str) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(c["rms_norm_eps"])) * w[f"{name}.weight"]

        h = w["model.embed_tokens.weight"][tokens]
        hidden = np.where(visible, np.float32(0), np.float32(-np.inf))
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = norm(h, f"{layer}.input_layernorm")
            q, k, v = (heads(x @ w[f"{layer}.self_attn.{n}_proj.weight"].T) for n in "qkv")
            q, k = rotate(q), rotate(k)
            if i < len(past):
                k, v = (np.concatenate([old, new], 1) for old, new in zip(past[i], (k, v), strict=True))
                past[i] = (k, v)
            else:
                past.append((k, v))
            group = len(q) // len(k)
            out = []
            for head, q_head in enumerate(q):
                s = q_head @ k[head // group].T / np.float32(d**0.5) + hidden
                p = np.exp(s - s.max(-1, keepdims=True))
                out.append(p / p.sum(-1, keepdims=True) @ v[head // group])
            h = h + np.concatenate(out, -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
            x = norm(h, f"{layer}.post_attention_layernorm")
            gate, up = (x @ w[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            h = h + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
        last = norm(h[-1], "model.norm")
        return w.get("lm_head.weight", w["model.embed_tokens.weight"]) @ last


def _frequencies(config: dict[str, Any]) -> np.ndarray:
    """RoPE frequencies, float64, with llama3 scaling: low ones divided, high ones kept, a linear blend between."""
    d = config["head_dim"]
    plain = config["rope_theta"] ** -(np.arange(0, d, 2) / d)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain
    assert scaling["rope_type"] == "llama3"
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)  # over the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling["factor"]
