"""lm-eval's own client, unmodified, against a live server: the scores are the engine's."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from kvgraph import Engine
from kvgraph.graph import ContextGraph


@pytest.fixture(scope="module")
def client(server) -> LocalCompletionsAPI:
    """With the server's own tokenizer, which the client finds by itself."""
    made = LocalCompletionsAPI(model=server.name, base_url=f"{server.url}/v1/completions", max_length=512, batch_size=2)
    assert made.tokenizer_backend == "remote"
    return made


def scored(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
    ids, rest = engine.tokenize(context), engine.tokenize(continuation)
    result = engine.score(ContextGraph([], ids), rest)
    return float(result.scores.sum()), result.greedy


def test_choices_are_scored(server, client, model):
    engine = Engine(model, kv_budget=1 << 28)
    likely = engine.generate(ContextGraph([], "2 + 2 ="), max_tokens=2, logit_bias={0: -100}).text
    pairs = [("2 + 2 =", " 4"), ("2 + 2 =", " 5"), ("Ships pass", " at night."), ("2 + 2 =", likely)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = client.loglikelihood(requests, disable_tqdm=True)
    want = [scored(engine, *pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in want], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_a_rolling_likelihood_is_that_of_the_text(server, client, model):
    text = "The harbour was dug by the guild. " * 30  # more than one window
    (found,) = client.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert found < 0
    short = "The harbour"
    (alone,) = client.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (short,), 0)], disable_tqdm=True)
    engine = Engine(model, kv_budget=1 << 28)
    start = client.prefix_token_id
    want = engine.score(ContextGraph([], [start]), engine.tokenize(short)).scores.sum()
    assert alone == pytest.approx(float(want), abs=1e-3)


def test_texts_are_generated(server, client, model):
    (found,) = client.generate_until(
        [Instance("generate_until", {}, ("Ships", {"until": ["\n"], "max_gen_toks": 5, "temperature": 0}), 0)],
        disable_tqdm=True,
    )
    want = Engine(model, kv_budget=1 << 28).generate(ContextGraph([], "Ships"), max_tokens=5, stop=("\n",))
    assert found == want.text
