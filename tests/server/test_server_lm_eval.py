"""lm-eval's own client, unmodified, against a live server: the scores are the engine's."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from kvgraph import Engine
from kvgraph.graph import ContextGraph


@pytest.fixture(scope="module")
def client(server) -> Any:
    """lm-eval's client, with the server's own tokenizer, which it finds by itself."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI  # not at the top: it takes a second

    made = LocalCompletionsAPI(model=server.name, base_url=f"{server.url}/v1/completions", max_length=512, batch_size=2)
    assert made.tokenizer_backend == "remote"
    return made


def instance(kind: str, arguments: tuple[Any, ...], number: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, number)


def scored(engine: Engine, context: str, continuation: str) -> tuple[float, bool]:
    ids, rest = engine.tokenize(context), engine.tokenize(continuation)
    result = engine.score(ContextGraph([], ids), rest)
    return float(result.scores.sum()), result.greedy


def test_choices_are_scored(server, client, model):
    engine = Engine(model, kv_budget=1 << 28)
    likely = engine.generate(ContextGraph([], "What is 2 + 2?"), max_tokens=2, logit_bias={0: -100}).text
    pairs = [("2 + 2 =", " 4"), ("2 + 2 =", " 5"), ("Ships pass", " at night."), ("What is 2 + 2?", likely)]
    requests = [instance("loglikelihood", pair, i) for i, pair in enumerate(pairs)]
    found = client.loglikelihood(requests, disable_tqdm=True)
    want = [scored(engine, *pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in want], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_a_rolling_likelihood_is_that_of_the_text(server, client, model):
    text = "The harbour was dug by the guild. " * 30  # more than one window
    (found,) = client.loglikelihood_rolling([instance("loglikelihood_rolling", (text,))], disable_tqdm=True)
    assert found < 0
    short = "The harbour"
    (alone,) = client.loglikelihood_rolling([instance("loglikelihood_rolling", (short,))], disable_tqdm=True)
    engine = Engine(model, kv_budget=1 << 28)
    start = client.prefix_token_id
    want = engine.score(ContextGraph([], [start]), engine.tokenize(short)).scores.sum()
    assert alone == pytest.approx(float(want), abs=1e-3)


def test_texts_are_generated(server, client, model):
    (found,) = client.generate_until(
        [instance("generate_until", ("Ships", {"until": ["\n"], "max_gen_toks": 5, "temperature": 0}))],
        disable_tqdm=True,
    )
    want = Engine(model, kv_budget=1 << 28).generate(ContextGraph([], "Ships"), max_tokens=5, stop=("\n",))
    assert found == want.text


TASKS = {
    "choices.yaml": """
task: kvgraph_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling.yaml": """
task: kvgraph_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def test_whole_tasks_run_unmodified(server, client, tmp_path):
    """Multiple choice and rolling likelihood as `lm-eval run` computes them; the scores follow from the likelihoods."""
    rows = [
        {"question": f"{n} + 1 =", "choices": [f" {n + 1}", f" {n + 2}", " a ship"], "label": 0} for n in range(3)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (tmp_path / name).write_text(text.replace("DATA", str(data)))
    names = ["kvgraph_choices", "kvgraph_rolling"]
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=client,
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )["results"]
    likely = client.loglikelihood(
        [instance("loglikelihood", (row["question"], choice)) for row in rows for choice in row["choices"]],
        disable_tqdm=True,
    )
    scores = [score for score, _ in likely]
    best = [max(range(3), key=lambda i: scores[3 * n + i]) for n in range(3)]
    assert found["kvgraph_choices"]["acc,none"] == pytest.approx(best.count(0) / 3)
    whole = client.loglikelihood_rolling(
        [instance("loglikelihood_rolling", (row["question"],)) for row in rows], disable_tqdm=True
    )
    bits = -sum(whole) / math.log(2) / sum(len(row["question"]) for row in rows)
    assert found["kvgraph_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


def test_chats_are_generated(server, model):
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    made = LocalChatCompletion(model=server.name, base_url=f"{server.url}/v1/chat/completions", tokenizer_backend=None)
    chat = json.dumps([{"role": "user", "content": "Name a ship."}])
    options = {"until": ["\n\n\n"], "max_gen_toks": 5, "temperature": 0}
    (found,) = made.generate_until(
        [instance("generate_until", (JsonChatStr(chat), options))], disable_tqdm=True
    )  # fmt: skip
    body = {"model": server.name, "messages": json.loads(chat), "max_tokens": 5, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert found == answer["choices"][0]["message"]["content"]
