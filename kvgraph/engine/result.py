"""What a request returns: text, tokens, why it ended, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgraph.engine.sampling import Sampled


@dataclass
class Usage:
    """What one request read and computed.

    prompt_tokens: tokens that the answer could attend to before decoding: every span version that the prompt span sees,
        and the prompt span itself.
    computed_tokens: tokens that this request ran through the model before its first output token: its prompt span, and
        the spans that it was first to need.
    reused_tokens: span tokens that it did not compute, by where they came from: "memory", "disk" (or another tier's
        name), or "shared" if another running request was already encoding them.
    live_tokens: tokens of its prompt span.
    probe_tokens: tokens run through the model's first layer alone before the plan was made (cacheblend). No other
        number includes them.
    kv_bytes: bytes of the stored KV that its prompt span reads, plus its own.
    probe: seconds that the probe took. They are part of queued, because time is counted from its beginning.
    queued, encoded, ttft: seconds from submission until it was admitted, until everything it reads was available, and
        until its first token.
    decode: seconds from its first to its last token.
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
        """Computed tokens other than the prompt span's: 0 if every document came from a store."""
        return self.computed_tokens - self.live_tokens

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was reused."""
        return max(0, min(self.prompt_tokens - self.live_tokens, sum(self.reused_tokens.values())))


@dataclass
class Result:
    """A finished request.

    text: the answer, without the token or stop string that ended it.
    token_ids: the answer's tokens, including the one that ended it.
    finish_reason: "stop" (end token, stop id or stop string), "length" or "cancelled".
    sampled: one entry per token, with log-probabilities if asked for.
    first_logits: [V] float32, from which the first token was chosen; kept if asked for.
    scores: [n] float32, log-probabilities of given answer tokens (`Engine.score`).
    greedy: whether each of these was the most likely token.
    answer_logprobs: [n, V] float32, log-probabilities of all tokens at each of these; kept if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    sampled: list[Sampled] = field(default_factory=list)
    first_logits: Tensor | None = field(default=None, compare=False)  # tensors have no truth value
    scores: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    greedy: bool = True
    answer_logprobs: Tensor | None = field(default=None, compare=False)


@dataclass
class Chunk:
    """A piece of a streamed answer: new text (may be empty) and its tokens; the last one has the result."""

    text: str
    token_ids: list[int]
    result: Result | None = None
