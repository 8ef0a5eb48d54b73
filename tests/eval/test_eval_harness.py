"""The adapter for lm-evaluation-harness: `full` has the scores of the harness's own model; other methods just run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra kvgraph[lm-eval]")

from kvgraph.demo import write_model  # noqa: E402
from kvgraph.eval.harness import KVGraphLM  # noqa: E402

ROWS = [
    {
        "q": f"Which letter comes after {a}{a * (i % 5)}?",
        "choices": [b, a, "none of them"],
        "answer": i % 3,
        "text": f"{a} {b}\n\n{b * i}",
    }
    for i, (a, b) in enumerate(zip("abcdefgh", "bcdefghi", strict=True))
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}", train: "{data}"}}}}
test_split: test
training_split: train
"""
TASKS = {
    "letters_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 3
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "letters_generate": """
output_type: generate_until
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
num_fewshot: 2
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
""",
    "letters_penalised": """
output_type: generate_until
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
num_fewshot: 2
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false, repetition_penalty: 1.5}}
metric_list: [{{metric: exact_match}}]
""",
    "letters_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
num_fewshot: 0
metric_list: [{{metric: bits_per_byte}}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    (folder / "model").mkdir()
    write_model(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        text = f"task: {name}" + (COMMON + text).format(data=folder / "data.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


def scores(folder, model: str, **arguments):
    """(the harness's results, what the model said to every request) of all tasks."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder / "model"), "dtype": "float32", **arguments},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=2,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    said = {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS}
    return found["results"], said


@pytest.fixture(scope="module")
def plain(folder):
    return scores(folder, "hf")


def test_full_gives_the_scores_of_the_harness_itself(folder, plain):
    results, said = scores(folder, "kvgraph", method="full")
    for name in ("letters_generate", "letters_penalised"):
        assert said[name] == plain[1][name]
    assert said["letters_penalised"] != said["letters_generate"]
    for name in ("letters_choice", "letters_rolling"):
        ours, theirs = ([one for sample in x[name] for reply in sample for one in reply] for x in (said, plain[1]))
        assert len(ours) == len(theirs) >= len(ROWS)
        for a, b in zip(ours, theirs, strict=True):
            a, b = (x if isinstance(x, tuple | list) else (x,) for x in (a, b))
            assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and list(a[1:]) == list(b[1:])
    for name, metrics in plain[0].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert results[name][metric] == pytest.approx(value, abs=1e-4), (name, metric)


@pytest.mark.parametrize("arguments", [{"method": "block"}, {"method": "graph-kv", "edges": "all"}])
def test_other_methods_see_the_examples_as_segments(folder, plain, arguments):
    _, said = scores(folder, "kvgraph", **arguments)
    assert said["letters_choice"] != plain[1]["letters_choice"]  # few-shot examples don't see each other
    assert [len(s) for s in said["letters_generate"]] == [len(s) for s in plain[1]["letters_generate"]]


def test_examples_are_segments_and_tokens_those_of_the_whole_text(folder):
    lm = KVGraphLM(str(folder / "model"), method="block", dtype="float32")
    text = "Q: a\nA: b\n\nQ: c\nA: d\n\nQ: e\nA:"
    graph = lm._graph(lm.tok_encode(text), lm._cuts(text, lm._encoded(text)), keep=1000)
    assert [lm.engine.detokenize(list(s)) for s in graph.segments] == ["Q: a\nA: b\n\n", "Q: c\nA: d\n\n"]
    assert lm.engine.detokenize(list(graph.query)) == "Q: e\nA:"
    short = lm._graph(lm.tok_encode(text), lm._cuts(text, lm._encoded(text)), keep=16)
    assert [len(s) for s in short.segments] == [9]
    assert lm.engine.detokenize(list(short.query)) == "Q: e\nA:"


@pytest.mark.slow  # the harness indexes its own tasks for 20 s
def test_the_command_is_the_harness_own(folder):
    run = subprocess.run(
        [sys.executable, "-m", "kvgraph.eval.harness", "run", "--model", "kvgraph", "--tasks", "letters_choice"]
        + ["--model_args", f"pretrained={folder / 'model'},method=block,dtype=float32"]
        + ["--include_path", str(folder / "tasks"), "--limit", "2"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "letters_choice" in run.stdout and "acc" in run.stdout
