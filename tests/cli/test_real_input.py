"""Real input: passages of Natural Questions, encoded once by `kvgraph encode`, then read by `kvgraph ask`.

The passages and GPT-2's tokenizer files are looked for in ../shared/data beside the repository, or where KVGRAPH_DATA
says; the model is a tiny random Llama. 150 passages by default, at least 2,000 with KVGRAPH_SOAK=1.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from commands import Command
from kvgraph.cli import main
from soak import SOAK

DATA = Path(os.environ.get("KVGRAPH_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
PASSAGES = DATA / "nq" / "nq-open-10_total_documents_gold_at_0.jsonl.gz"
VOCABULARY = DATA / "gpt2_tokenizer"
COUNT = 2500 if SOAK else 150
QUESTIONS = 5 if SOAK else 2

pytestmark = pytest.mark.skipif(
    not (PASSAGES.is_file() and VOCABULARY.is_dir()),
    reason=f"no real input: {PASSAGES} or {VOCABULARY} is missing; set KVGRAPH_DATA to the folder that has them",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama with GPT-2's vocabulary, saved as people save models."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = json.loads((VOCABULARY / "gpt2.encoder.json").read_text(encoding="utf-8"))
    lines = (VOCABULARY / "gpt2.vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:] if line]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=50256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[tuple[str, list[str]]]]:
    """(JSON Lines of at least COUNT distinct passages, [(question, ids of its ten passages)])."""
    path = tmp_path_factory.mktemp("corpus") / "passages.jsonl"
    ids: dict[tuple[str, str], str] = {}
    questions = []
    with gzip.open(PASSAGES, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            passages = [(c["title"], c["text"]) for c in row["ctxs"]]
            questions.append((row["question"], [ids.setdefault(p, f"p{len(ids)}") for p in passages]))
            if len(ids) >= COUNT:
                break
    with open(path, "w", encoding="utf-8") as out:
        for (title, text), id_ in ids.items():
            out.write(json.dumps({"id": id_, "title": title, "text": text}, ensure_ascii=False) + "\n")
    assert len(ids) >= COUNT
    return path, questions


@pytest.fixture
def here(capsys):
    """The command line in this process: its stdout."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out = capsys.readouterr()
        assert not end.value.code, out.err
        return out.out

    return run


def elsewhere(*words: object) -> str:
    """The command line in a process of its own: its stdout."""
    done = Command(*words)
    assert done.wait() == 0, done.stderr
    return done.stdout


def figure(what: str, line: str) -> int:
    """The number before or after `what`."""
    found = re.search(rf"([\d,]+) {what}|{what} +([\d,]+)", line)
    return int((found[1] or found[2]).replace(",", ""))


def test_questions_over_an_encoded_corpus_compute_no_document(here, model, corpus, tmp_path, capsys):
    path, questions = corpus
    store = tmp_path / "kv"
    passages = path.read_text(encoding="utf-8").count("\n")
    first = here("encode", model, path, "--store", store, "--method", "block")
    assert figure("documents", first) == passages
    assert figure("tokens computed", first) > 100 * passages
    again = here("encode", model, path, "--store", store, "--method", "block")
    assert figure("tokens computed", again) == 0
    assert figure("reused", again) == figure("tokens computed", first) + figure("reused", first)
    stat = here("store", "stats", "--store", store)
    assert figure("records", stat) == passages
    seen = [first, again, stat]

    for number, (question, ids) in enumerate(questions[:QUESTIONS]):
        words = [
            "ask",
            model,
            f"\n{question}?\n",
            "--documents",
            path,
            "--pick",
            ",".join(ids),
            "--max-tokens",
            16,
            "--json",
            "--method",
            "block",
        ]
        cold = json.loads(here(*words))
        assert cold["usage"]["document_tokens_computed"] > 1000
        for run in (here, here) if number else (here, elsewhere):
            warm = json.loads(run(*words, "--store", store))
            assert warm["usage"]["document_tokens_computed"] == 0
            assert warm["usage"]["reused_tokens"] == {"disk": cold["usage"]["document_tokens_computed"]}
            assert warm["token_ids"] == cold["token_ids"]
            assert warm["text"] == cold["text"]
        seen.append(f"{question}: first token {cold['usage']['ttft']:.3f} s cold, {warm['usage']['ttft']:.3f} s warm\n")
    if SOAK:
        with capsys.disabled():
            print("", *seen, sep="\n")


def test_a_question_that_was_asked_once_is_warm_without_encode(here, model, corpus, tmp_path):
    """`ask` keeps what it computed: the second time, in a new process, nothing of the documents is computed."""
    path, questions = corpus
    question, ids = questions[-1]
    words = ["ask", model, question, "--documents", path, "--pick", ",".join(ids), "--store", tmp_path, "--json"]
    cold, warm = (json.loads(run(*words, "--max-tokens", 8)) for run in (here, elsewhere))
    assert cold["usage"]["document_tokens_computed"] > 1000
    assert warm["usage"]["document_tokens_computed"] == 0
    assert warm["token_ids"] == cold["token_ids"]
