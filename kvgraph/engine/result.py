"""What a request returns: text, tokens, why it ended, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgraph.engine.sampling import Sampled


@dataclass
class Usage:
    """What one request read and computed. Times are seconds; bytes are of KV.

    prompt_tokens: tokens the answer could attend to before decoding: every span version the prompt span sees, and the
    prompt span itself. computed_tokens: tokens this request ran through the model before its first output token (spans
    it was first to need, and its prompt span). reused_tokens: span tokens it did not compute, by where they came from:
    "memory", "disk" (or another tier's name), "shared" (another running request was already encoding them).
    probe_tokens: tokens run through the model's first layer alone before the plan was made (cacheblend); they are in no
    other number. probe: the seconds this took; submission is counted from its beginning, so they are in queued too.
    kv_bytes: stored KV its prompt span reads plus its own. From submission: queued, until it was admitted; encoded, until
    everything it reads was at hand; ttft, until its first token. decode: first to last token.
    """

    prompt_tokens: int = 0
    computed_tokens: int = 0
    reused_tokens: dict[str, int] = field(default_factory=dict)
    completion_tokens: int = 0
    live_tokens: int = 0
    probe_tokens: int = 0
    kv_bytes: int = 0
    probe: float = 0.0
    queued: float = 0.0
    encoded: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0

    @property
    def document_tokens_computed(self) -> int:
        """Computed tokens besides the prompt span's: 0 when every document came from a store."""
        return self.computed_tokens - self.live_tokens


@dataclass
class Result:
    """A finished request. finish_reason: "stop" (end token, stop id or stop string), "length" or "cancelled".

    token_ids include the token that ended the answer; text has neither it nor a stop string. sampled: one entry a
    token, with log-probabilities when asked for. first_logits [V] float32: what the first token was chosen from, kept
    when asked for. scores [n] float32: log-probabilities of given answer tokens (`Engine.score`); greedy: whether each of
    them was the likeliest.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    sampled: list[Sampled] = field(default_factory=list)
    first_logits: Tensor | None = field(default=None, compare=False)  # tensors have no truth value
    scores: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    greedy: bool = True


@dataclass
class Chunk:
    """A piece of a streamed answer: new text (may be empty) and its tokens; the last one has the result."""

    text: str
    token_ids: list[int]
    result: Result | None = None
