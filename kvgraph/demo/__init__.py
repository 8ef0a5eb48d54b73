"""What ships with the package: a LoRA adapter for SmolLM2-135M-Instruct and ten short articles for `kvgraph demo`, and the
small model of the synthetic world for `kvgraph demo --world`.

`write_model` makes a random model of another size on the spot, for tests and examples. The articles were written for
this project and are in the public domain (CC0 1.0; see LICENSE-documents.txt).
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvgraph.data import io
from kvgraph.data.chat import Document
from kvgraph.data.corpus import CorpusDocument, load
from kvgraph.errors import KVGraphError
from kvgraph.graph import Edge

FOLDER = Path(str(files(__package__)))
DOCUMENTS, QUESTIONS = FOLDER / "documents.jsonl", FOLDER / "questions.jsonl"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
KVLINK = "kvlink:links=1,link_start=3,slots=14"  # the link tokens that the adapter was trained with
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LINK_SLOTS, LINKS = 10, 2  # KVLink's link tokens: documents that have some, and how many each
CHAT_TEMPLATE = (  # roles in words, one message per paragraph
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = ["<|end|>", "<|mem_start|>", "<|mem_end|>", *(f"<|link_{i}|>" for i in range(LINKS * LINK_SLOTS))]

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 6, 4, 2, 64, 768
SHARPNESS = 4  # standard deviation of attention scores, large enough for a few keys among thousands to matter


def documents() -> list[CorpusDocument]:
    """The ten documents, in order."""
    return load(DOCUMENTS)


def articles() -> list[Document]:
    """The ten documents with their titles apart, as prompts take them."""
    return [Document(row["text"], row["title"], row["id"]) for row in _rows(DOCUMENTS)]


def questions() -> list[str]:
    """A few questions that the articles answer."""
    return [question for question, _ in answered()]


def answered() -> list[tuple[str, str]]:
    """The questions with their answers, each a short string in one of the articles."""
    return [(row["question"], row["answer"]) for row in _rows(QUESTIONS)]


def citations() -> tuple[Edge, ...]:
    """Edges (cited document, citing document): a document reads those it refers to."""
    return tuple((cited, row["id"]) for row in _rows(DOCUMENTS) for cited in row["cites"])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def adapter() -> Path:
    """The folder of the adapter that ships with the package. Its base is SmolLM2-135M-Instruct.

    Raises KVGraphError when it isn't there.
    """
    return _shipped("adapter", ADAPTER_FILES)


def model() -> Path:
    """The folder of the model that ships with the package, trained on the synthetic world (kvgraph.data.world).

    Raises KVGraphError if it isn't there.
    """
    return _shipped("model", MODEL_FILES)


def _shipped(name: str, needed: tuple[str, ...]) -> Path:
    folder = FOLDER / name
    if missing := [file for file in needed if not (folder / file).is_file()]:
        raise KVGraphError(
            f"the {name} that ships with kvgraph lacks {missing[0]} in {folder}; install kvgraph again, or in a checkout "
            f"restore that folder with `git checkout -- kvgraph/demo/{name}`"
        )
    return folder


def write_model(folder: Path, seed: int = 0) -> None:
    """Write a tiny Llama with random weights and a byte-level tokenizer (one token per byte) as a Hugging Face folder.

    Its answers mean nothing, but every tensor matters, which is enough to test exactness and speed.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    vocab = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    io.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    io.write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "intermediate_size": MLP,
            "vocab_size": vocab,
            "max_position_embeddings": 1 << 15,
            "eos_token_id": tokenizer.token_to_id(SPECIAL[0]),
            "tie_word_embeddings": False,
            "dtype": "float32",
        },
    )
    save_file(_weights(vocab, torch.Generator().manual_seed(seed)), folder / "model.safetensors", {"format": "pt"})


def token_id(token: str) -> int:
    """Id of one of the tiny tokenizer's special tokens."""
    return 256 + SPECIAL.index(token)


def _weights(vocab: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights under the names that Hugging Face gives a Llama's, [out, in] each, scaled by the width of the input."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": random(vocab, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN) * SHARPNESS,
            f"{layer}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
            f"{layer}.mlp.gate_proj.weight": random(MLP, HIDDEN),
            f"{layer}.mlp.up_proj.weight": random(MLP, HIDDEN),
            f"{layer}.mlp.down_proj.weight": random(HIDDEN, MLP),
        }
    return weights
