"""From logits to tokens: one decode policy for every method.

`SamplingParams` says what is wanted, `Sampler` picks tokens from logits. `kvgraph.engine.detokenize` makes them text.

A token is chosen in this order, that of Hugging Face's `GenerationMixin._get_logits_processor`:
grammar -> logit bias -> repetition penalty -> frequency and presence penalty -> no end before min_tokens -> temperature -> top-k ->
top-p -> min-p -> one draw from what is left, renormalised. (Hugging Face has no frequency and presence penalties; vLLM has
them at this place, and min-p before top-k and top-p.)
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from kvgraph.engine.guide import Grammar, GrammarError
from kvgraph.errors import KVGraphError, ModelError


class SamplingError(KVGraphError, ValueError):
    """A sampling parameter is out of range or of the wrong type."""


@dataclass(frozen=True)
class SamplingParams:
    """How to decode. Raises SamplingError, naming the field, for an invalid value.

    max_tokens: maximum number of tokens to generate, >= 1.
    temperature: divides the logits. 0 is greedy, with ties going to the lowest id; the three filters and the seed then
        have no effect.
    top_k: keep the k most likely tokens, with ties of the k-th; 0 is off.
    top_p: keep the smallest set of most likely tokens, at least one, whose probabilities sum to at least this, in
        [0, 1]; 1 is off (Holtzman et al., arXiv 1904.09751).
    min_p: keep tokens whose probability is at least this share of the highest, in [0, 1]; 0 is off (arXiv 2407.01082).
    seed: the same seed gives the same tokens, whatever else is in the batch; None draws one from the operating system.
    repetition_penalty: tokens of the prompt and of the answer so far have positive logits divided and negative ones
        multiplied by it, once each; 1 is off (CTRL, arXiv 1909.05858, section 4.1).
    frequency_penalty, presence_penalty: a token that the answer has n times loses n times the first, and the second
        once, from -2 to 2; 0 is off (as OpenAI's API has them; tokens of the prompt don't count).
    logit_bias: {token id: what is added to its logit}.
    min_tokens: no end token, stop token or stop string ends the answer before it has this many tokens.
    stop: strings that end the answer; they are not part of it. A single string is allowed.
    stop_token_ids: token ids that end the answer.
    ignore_eos: don't end at the model's own end tokens.
    grammar: what the answer must be. It ends where the grammar ends, and, unless stop or max_tokens end it before, is a
        text of the grammar, whatever ignore_eos and min_tokens say.
    logprobs: n gives the natural log-probabilities of the chosen token and of the n most likely ones, as the model
        gives them, before grammar, penalty, temperature and filters; None gives none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _require(
            _is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a number >= 0"
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer >= 0 (0 is off)")
        _require(_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", self.top_p, "a number in [0, 1] (1 is off)")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1] (0 is off)")
        _require(
            _is_number(self.repetition_penalty) and 0.001 <= self.repetition_penalty <= 1000,
            "repetition_penalty",
            self.repetition_penalty,
            "a number from 0.001 to 1000 (1 is off)",
        )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, name, value, "a number from -2 to 2 (0 is off)")
        bias = self.logit_bias
        _require(
            isinstance(bias, Mapping) and all(_is_int(i) and i >= 0 and _is_number(b) for i, b in bias.items()),
            "logit_bias",
            bias,
            "a mapping of token ids to numbers",
        )
        _require(_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer >= 0")
        _require(
            self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64),
            "seed",
            self.seed,
            "None or an integer of at most 64 bits",
        )
        _require(
            self.logprobs is None or (_is_int(self.logprobs) and self.logprobs >= 0),
            "logprobs",
            self.logprobs,
            "None or an integer >= 0",
        )
        _require(
            self.grammar is None or isinstance(self.grammar, Grammar), "grammar", self.grammar, "None or a Grammar"
        )
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        object.__setattr__(self, "stop", stop_strings(self.stop))
        ids = self.stop_token_ids
        _require(
            isinstance(ids, Iterable) and not isinstance(ids, str | bytes),
            "stop_token_ids",
            ids,
            "a sequence of token ids",
        )
        ids = tuple(ids)
        _require(
            all(_is_int(i) and i >= 0 for i in ids), "stop_token_ids", ids, "a sequence of token ids (integers >= 0)"
        )
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def takes_best(self) -> bool:
        """Whether the choice is simply the most likely token, which can be found for many rows at once."""
        changes = self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty or self.logit_bias
        more = self.min_tokens or self.logprobs is not None or self.grammar is not None
        return self.temperature == 0 and not changes and not more


class Sampled(NamedTuple):
    """A chosen token. logprob, and top (the most likely tokens with theirs, best first), are set if asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks the tokens of one request. It owns the request's random numbers, so batching can't change them.

    prompt_tokens count as already seen by the repetition penalty, as in Hugging Face and vLLM. ends: the tokens that may
    not come before `min_tokens`.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: Iterable[int] = (), ends: Iterable[int] = ()):
        self.params = params
        self._ends = sorted(set(ends)) if params.min_tokens else []
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        self._prompt = tuple(prompt_tokens) if params.repetition_penalty != 1 else ()
        self._seen: Tensor | None = None  # [V] bool; made when the first logits show V
        self._generator = torch.Generator()
        seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else int(params.seed)
        self._generator.manual_seed(seed)

    def __call__(self, logits: Tensor, best: tuple[int, float] | None = None, allowed: Tensor | None = None) -> Sampled:
        """Choose from logits [V]; -inf excludes a token. Raises ModelError for NaN, +inf, or nothing but -inf.

        best: the most likely token (the first of several) and its logit, if known and the parameters' `takes_best`.
        allowed: the tokens that the grammar lets come next [V] bool. Raises GrammarError if there is none.
        """
        if best is not None and math.isfinite(best[1]):
            return Sampled(best[0])
        logits = logits.detach().float()
        if not math.isfinite(logits.max()):  # NaN wins every maximum
            what = "NaN" if logits.isnan().any() else "infinite"
            raise ModelError(f"the model gave {what} logits: damaged weights, or too narrow a dtype; try float32")
        guided = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
        if allowed is not None and not guided.max() > -math.inf:
            raise GrammarError("no token of this model continues the answer as its grammar asks")
        scores = self._long_enough(self._discouraged(self._penalised(self._biased(guided))))
        if self.params.temperature == 0:
            token = int(scores.argmax())  # the first of several maxima
        else:
            token = self._draw(filtered(scores, self.params))
        if self._seen is not None:
            self._seen[token] = True
        self._counts[token] += 1
        if self.params.logprobs is None:
            return Sampled(token)
        logprobs = logits.log_softmax(-1)
        return Sampled(token, float(logprobs[token]), likeliest(logprobs, self.params.logprobs))

    def _biased(self, logits: Tensor) -> Tensor:
        bias = {token: value for token, value in self.params.logit_bias.items() if token < len(logits)}
        return _added(logits, bias)

    def _penalised(self, logits: Tensor) -> Tensor:
        if self.params.repetition_penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            # A vocabulary may have ids that the output layer lacks; those can't be chosen anyway.
            self._seen[[t for t in set(self._prompt) if t < len(logits)]] = True
        penalty = self.params.repetition_penalty
        return torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _discouraged(self, logits: Tensor) -> Tensor:
        frequency, presence = self.params.frequency_penalty, self.params.presence_penalty
        if not (frequency or presence):
            return logits
        return _added(logits, {token: -presence - frequency * n for token, n in self._counts.items()})

    def _long_enough(self, logits: Tensor) -> Tensor:
        """Without the end tokens while the answer is too short; a bias or penalty can leave no other token: then with."""
        ends = [token for token in self._ends if token < len(logits)]
        if not ends or self._counts.total() >= self.params.min_tokens:
            return logits
        scores = logits.clone()
        scores[ends] = -math.inf
        return scores if scores.max() > -math.inf else logits

    def _draw(self, probs: Tensor) -> int:
        """One token, by inverting the cumulative distribution in id order, which is least sensitive to rounding."""
        cumulative = probs.cumsum(-1)
        u = torch.rand((), generator=self._generator, dtype=torch.float64).to(probs.device)
        return int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] float64 after temperature (> 0), top-k, top-p and min-p. They sum to 1."""
    scores = scores.double()
    scores = (scores - scores.max()) / params.temperature  # the highest is 0, so nothing can overflow
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1:
        probs, ids = scores.softmax(-1).sort(descending=True, stable=True)  # stable: ties keep the lowest ids
        before = probs.cumsum(-1) - probs
        scores[ids[1:][before[1:] >= params.top_p]] = -math.inf  # one token stays, whatever the rounding
    if params.min_p > 0:
        scores = scores.masked_fill(scores.exp() < params.min_p, -math.inf)
    return scores.softmax(-1)


def _added(logits: Tensor, values: Mapping[int, float]) -> Tensor:
    """Logits [V] with values added to some of them, by token id."""
    if not values:
        return logits
    ids = torch.tensor(list(values), device=logits.device)
    return logits.index_add(0, ids, torch.tensor(list(values.values()), dtype=logits.dtype, device=logits.device))


def likeliest(logprobs: Tensor, n: int) -> tuple[tuple[int, float], ...]:
    """The n highest of logprobs [V] with their ids, best first, ties by id."""
    n = min(n, len(logprobs))
    if n == 0:
        return ()
    ids = (logprobs >= logprobs.topk(n).values[-1]).nonzero().flatten()  # ascending, ties of the n-th included
    order = logprobs[ids].argsort(descending=True, stable=True)[:n]
    return tuple(zip(ids[order].tolist(), logprobs[ids[order]].tolist(), strict=True))


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    wanted = "a string or a sequence of strings, none of them empty"
    _require(isinstance(stop, Iterable) and not isinstance(stop, bytes), "stop", stop, wanted)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    _require(all(isinstance(s, str) and s for s in stops), "stop", stops, wanted)
    return stops


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """A finite real number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _require(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise SamplingError(f"{name} must be {wanted}, not {value!r}")
