"""KVLink's recipe from raw records to served answers, with the special tokens of Llama 3 at their real ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import families
from kvgraph import Engine, methods
from kvgraph.cli import main
from kvgraph.data.world import tokenizer as world_tokenizer
from kvgraph.models import load, trainable
from kvgraph.train import recipes
from kvgraph.train.config import Component
from kvgraph.train.forward import logits
from kvgraph.train.links import rows_of
from kvgraph.train.mixture import Mixture, open_source
from kvgraph.train.pack import lay
from kvgraph.train.records import example as make_example
from serving import spawn
from soak import SOAK
from train_runs import rows

# Llama 3: 128,000 tokens of text, then 256 special ones, of which most are in reserve.
TEXT, SPECIAL = 128_000, 256
KNOWN = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FIRST_LINK = 128_011
STEPS, BATCH, LENGTH = (4, 4, 8192) if SOAK else (2, 2, 2048)


def special_tokens() -> list[str]:
    """Llama 3's special tokens in the order of their ids; those in reserve are numbered."""
    found: list[str] = []
    for i in range(SPECIAL):
        reserved = sum(token.startswith("<|reserved") for token in found)
        found.append(KNOWN.get(i, f"<|reserved_special_token_{reserved}|>"))
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama with a vocabulary of Llama 3's size; of the text tokens, the first 256 are bytes and the rest unused."""
    folder = tmp_path_factory.mktemp("llama3")
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"unused {i}" for i in range(256, TEXT))]
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special_tokens())
    raw.post_processor = TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", TEXT)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    made.chat_template = CHAT
    made.save_pretrained(folder)
    families.build(
        "Llama",
        vocab_size=TEXT + SPECIAL,
        hidden_size=32,
        num_hidden_layers=2,
        rope_parameters=families.LLAMA3,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=TEXT,
        eos_token_id=TEXT + 9,
        pad_token_id=TEXT + 4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(llama, tmp_path_factory) -> Path:
    """Everything the recipe trains on, prepared from the samples as a user would."""
    folder = tmp_path_factory.mktemp("data")
    for name in sorted({c.source for c in recipes.get("kvlink-5").stages[0].components}):
        words = ["data", "prepare", name, "--sample", "--out", str(folder / name), "--validation", "0.2"]
        if name.startswith("qa-"):
            words += ["--set", "answers=gold", "--set", "retriever=none"]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--tokenizer", str(llama)])
        assert not ended.value.code, name
    return folder


@pytest.fixture(scope="module")
def trained(llama, data, tmp_path_factory) -> Path:
    """The recipe's checkpoint after a few steps, exported."""
    folder = tmp_path_factory.mktemp("run")
    shortened = ["--limit", STEPS, "--batch", BATCH, "--length", LENGTH, "--evaluate-every", STEPS, "--evaluation", 2]
    for words in (
        ["train", "--recipe", "kvlink-5", "--model", llama, "--data", data, "--out", folder / "run", *shortened],
        ["train", "export", folder / "run", folder / "model"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words)])
        assert not ended.value.code
    return folder / "model"


def mixture(data: Path, using, components: tuple[Component, ...]) -> Mixture:
    sources = [open_source(c, data, using, 0, "train", 8192 - 202) for c in components]
    return Mixture(components, sources, 0, length=8192, limit=131072)


def test_the_tokens_are_those_of_llama_3(llama):
    using = load(llama).tokenizer
    assert using.convert_tokens_to_ids("<|reserved_special_token_3|>") == FIRST_LINK
    assert using.convert_tokens_to_ids("<|reserved_special_token_247|>") == TEXT + 255
    for links in (1, 5):
        method = methods.get(f"kvlink-llama3-{links}")
        own = rows_of(method)
        assert len(own) == len(set(own)) == links * method.slots + 2 and own[0] == FIRST_LINK
        assert own[-2:] == [TEXT + 254, TEXT + 255]
        names = using.convert_ids_to_tokens(own)
        assert all(name.startswith("<|reserved_special_token_") for name in names)


def test_every_component_trains(trained):
    """The run took its steps on every part of the mixture it drew, and the links' rows moved."""
    log = rows(trained.parent / "run")
    assert [row["step"] for row in log if "lr" in row] == [*range(1, STEPS + 1)]
    components = {c.name for c in recipes.get("kvlink-5").stages[0].components}
    evaluated = {row["component"].split("/")[0] for row in log if "exact" in row}
    assert evaluated and evaluated <= components
    config = json.loads((trained.parent / "run" / "config.json").read_text())
    assert config["stages"][0]["components"][0]["weight"] == 20


def test_no_text_gets_an_id_in_reserve(llama, data):
    """In every packed example the links and memory tokens stand where the method puts them, and nowhere else."""
    using = load(llama).tokenizer
    components = recipes.get("kvlink-5").stages[0].components
    drawing = mixture(data, using, components)
    linked = 0
    for _ in range(60):
        (drawn,) = drawing.draw()
        found = [t for t in drawn.laid.tokens.tolist() if t >= FIRST_LINK]
        if drawn.method.name != "kvlink":
            assert not found
            continue
        slots = len(drawn.example.graph.segments)
        assert sorted(found) == [*range(FIRST_LINK, FIRST_LINK + 5 * slots), TEXT + 254, TEXT + 255]
        linked += slots > 0
    assert linked >= 10 and not any(drawing.left_out.values())


def test_a_text_that_spells_a_link_token_is_left_out(llama, data, tmp_path):
    using = load(llama).tokenizer
    source = data / "daring-anteater-mem"
    folder = tmp_path / "daring-anteater-mem"
    folder.mkdir()
    lines = (source / "train.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    record["documents"][0] += "<|reserved_special_token_7|>"
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join([json.dumps(record), *lines[1:3]]) + "\n")
    (folder / "prepared.json").write_bytes((source / "prepared.json").read_bytes())
    component = Component("x", "daring-anteater-mem", ("kvlink-llama3-5",))
    drawing = mixture(tmp_path, using, (component,))
    for _ in range(4):
        (drawn,) = drawing.draw()
        assert using.convert_tokens_to_ids("<|reserved_special_token_7|>") not in drawn.example.graph.segments[0]
    assert drawing.left_out == {"x": drawing.counts["x"] - 4} and drawing.left_out["x"]


def test_the_exported_model_is_served_as_kvlink(trained, llama, data):
    """Training, engine and server agree on one checkpoint, which an ordinary loader reads."""
    declared = json.loads((trained / "config.json").read_text())["kvgraph"]
    assert declared["tuned_for"] == ["kvlink"]
    model, before = load(trained), load(llama)
    moved = (model.hf.get_input_embeddings().weight != before.hf.get_input_embeddings().weight).any(1)
    assert moved[FIRST_LINK : FIRST_LINK + 5].all() and moved[TEXT + 254] and moved[TEXT + 255]

    method = methods.get("kvlink-llama3-5")
    lines = (data / "daring-anteater-mem" / "train.jsonl").read_text().splitlines()
    record = next(r for r in map(json.loads, lines) if r["documents"])
    example = make_example(record, model.tokenizer)
    graph = example.graph.with_query(example.questions[0].query)
    packed = lay(example, method)
    with torch.no_grad():
        expected = logits(trainable(model.hf.eval()), packed)[0]
    with Engine.load(trained) as engine:
        assert (engine.logits(method.plan(graph)) - expected).abs().max() <= 1e-4
        wanted = engine.generate(graph, method, max_tokens=12)
    assert wanted.text

    flags = ["--model", trained, "--method", "kvlink-llama3-5", "--document-template", "{text}"]
    with spawn(*flags) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        for computed in (True, False):
            answer = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=record["messages"][:-1],
                max_tokens=12,
                temperature=0,
                extra_body={"documents": [{"text": text} for text in record["documents"]]},
            )
            assert answer.choices[0].message.content == wanted.text
            did = answer.usage.kvgraph
            assert did["method"].startswith("kvlink") and bool(did["document_tokens_computed"]) is computed


def test_world_links_are_apart_from_words():
    """The same holds of the world's own tokenizer."""
    own = rows_of(methods.parse(world_tokenizer.kvlink(4)))
    assert len(own) == len(set(own)) == world_tokenizer.LINKS + 2
