"""Training steps of an adapter on a GPU, by either kind of attention: parts of `benchmarks.gpu`.

The model has the shape of SmolLM2-135M with random weights, an adapter of rank 16 on every matrix, and activations in bf16. A step
has 16 examples of 3 to 12 documents and their questions, as in the training of the adapter that ships; no two steps are alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import ids
from kvgraph import ContextGraph, methods, models
from kvgraph.train.config import FLEX
from kvgraph.train.example import Example
from kvgraph.train.forward import logits, loss
from kvgraph.train.pack import Packed, pack

SMOLLM2 = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536,
    vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
EXAMPLES, LENGTH = 16, 16384  # of a step; tokens of a sequence
Profile = Callable[[Callable[[], Any]], list[str]]


def figures(
    attention: str, device: str, count: int, profile: Profile, shape: dict[str, Any] = SMOLLM2
) -> dict[str, Any]:
    """Seconds of each of `count` steps, and tokens/s without the first two."""
    steps = [_sequences(seed, shape["vocab_size"]) for seed in range(count)]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainable, module = _adapted(device, shape)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step(sequences: list[Packed]) -> None:
        for packed in sequences:
            placed = packed.to(device)
            placed = placed.padded(LENGTH) if attention == FLEX else placed
            with torch.autocast(device, torch.bfloat16):
                found: Tensor = logits(trainable, placed, module=module, flex=attention == FLEX)
            loss(found, placed, totals=packed.counts).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for sequences in steps:
        _wait(device)
        started = time.perf_counter()
        step(sequences)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    tokens = [sum(map(len, sequences)) for sequences in steps]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {
        "attention": attention,
        "seconds of each step": [round(s, 3) for s in seconds],
        "tokens/s": sum(tokens[2:]) / sum(seconds[2:]),
        "peak GB": peak,
        "profile": profile(lambda: step(steps[-1])),
    }


def _adapted(device: str, shape: dict[str, Any]) -> tuple[models.Trainable, Any]:
    """A random model with a new adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**shape))
    trainable = models.trainable(hf)
    module = get_peft_model(hf, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return trainable, module.to(device).train()


def _sequences(seed: int, vocabulary: int) -> list[Packed]:
    """The sequences of a step."""
    rng = random.Random(seed)
    made = []
    for number in range(EXAMPLES):
        first = 1000 * (seed * EXAMPLES + number)
        documents = [ids(rng.randint(60, 200), first + i, vocabulary) for i in range(rng.randint(3, 12))]
        graph = ContextGraph(documents, prefix=ids(20, first + 100, vocabulary))
        questions = [(ids(20, first + 200 + i, vocabulary), ids(6, first + 300 + i, vocabulary)) for i in range(6)]
        made.append((Example(graph, questions), methods.parse(rng.choice(("full", "block")))))
    return pack(made, LENGTH)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
