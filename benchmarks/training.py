"""Training steps on many questions about shared documents: packed on one layout of the documents, against one question per
sequence; attention a few rows at a time, against all rows of an example at once; and autocast to bfloat16 with our attention
on the CPU, against PyTorch's.

Every side runs forward and backward over the same questions without padding. The third side packs too, but repeats the
documents for every question, like an ordinary packer. Losses and gradients are equal, up to rounding in bfloat16; the sides run in turn.

    python -m benchmarks.training --length 150 --questions 6 --shape small

is nearer to the training of a real model: most of its tokens are documents.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import SMALL, arguments, ids, interleaved, median, report
from kvgraph import ContextGraph, methods, models
from kvgraph.attention.backends import cpu
from kvgraph.train import forward
from kvgraph.train.example import Example
from kvgraph.train.forward import logits, loss
from kvgraph.train.pack import Packed, pack

ALL_ROWS = "the same, all rows at once"
HALF, THEIRS = "the same in bfloat16", "the same in bfloat16, PyTorch's attention"
# The size of a model that learns a small synthetic world on a CPU: 2.7 M parameters and a whole-word vocabulary.
TINY = dict(
    hidden_size=192, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=3, head_dim=64,
    intermediate_size=512, vocab_size=256, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


def main() -> None:
    args = arguments(
        __doc__, shape="tiny", method="block", documents=10, length=40, questions=24, query=12, answer=2, repeats=5
    )
    torch.manual_seed(0)
    config = LlamaConfig(**{"tiny": TINY, "small": SMALL}[args.shape])
    model = models.trainable(LlamaForCausalLM(config).to(args.device).train())
    method = methods.parse(args.method)
    documents = [ids(args.length, i, config.vocab_size) for i in range(args.documents)]
    graph = ContextGraph(documents, prefix=ids(4, 1000, config.vocab_size))
    both = [ids(args.query + args.answer, 2000 + i, config.vocab_size) for i in range(args.questions)]
    questions = [(q[: args.query], q[args.query :]) for q in both]

    together = [(Example(graph, questions), method)]
    apart = [(Example(graph, [question]), method) for question in questions]
    length = max(4096, len(pack(together, 1 << 30)[0]))
    sides = {
        "many questions on shared documents": pack(together, length),
        ALL_ROWS: pack(together, length),
        "packed, every question with its documents": pack(apart, length),
        "one question a sequence": [pack([one], length)[0] for one in apart],
        HALF: pack(together, length),
        THEIRS: pack(together, length),
    }
    sides = {name: [packed.to(args.device) for packed in sequences] for name, sequences in sides.items()}
    times = interleaved(
        {name: partial(step, model, sequences, name) for name, sequences in sides.items()},
        args.repeats,
        args.device,
    )
    slowest = median(times["one question a sequence"])
    rows: list[dict[str, Any]] = [
        {
            "side": name, "sequences": len(sequences), "tokens": sum(map(len, sequences)),
            "ms a step": median(times[name]) * 1e3, "questions/s": args.questions / median(times[name]),
            "speed-up": slowest / median(times[name]), "loss": step(model, sequences, name),
        }
        for name, sequences in sides.items()
    ]  # fmt: skip
    parameters = sum(p.numel() for p in model.hf.parameters()) / 1e6
    title = f"Training on {args.questions} questions about {args.documents} × {args.length} tokens, {parameters:.3g} M Llama"
    report(title, rows, args, {"speed-up of sharing": (rows[0]["speed-up"], "≥ 1.5 on a CPU")})


def step(model: models.Trainable, sequences: list[Packed], side: str) -> float:
    """Forward and backward over the sequences of one optimizer step, as this side does it; returns their loss."""
    rows = 1 << 30 if side == ALL_ROWS else forward.ROWS
    kernel = None if side == THEIRS else cpu.halves()
    model.hf.zero_grad()
    answers = sum(packed.counts[0] for packed in sequences)
    total = 0.0
    with (
        patch.object(forward, "ROWS", rows),
        patch.object(cpu, "halves", lambda: kernel),
        torch.autocast(model.hf.device.type, torch.bfloat16, enabled=side in (HALF, THEIRS)),
    ):
        for packed in sequences:
            value = loss(logits(model, packed), packed, totals=(answers, 0))
            value.backward()
            total += value.item()
    return total


if __name__ == "__main__":
    main()
