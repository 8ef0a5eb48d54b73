"""The world's own tokenizer: one token per word, two per name, as a standard `tokenizers` file.

Ids: special tokens, KVLink's link tokens, words, first syllables, second syllables. Spaces and line ends aren't tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvgraph import methods
from kvgraph.data import io
from kvgraph.data.world import names, world

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS, UNKNOWN, MEM_START, MEM_END = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<mem_start>", "<mem_end>")
LINKS_EACH = 4  # link tokens of a document
LINKS = 24 * LINKS_EACH  # of 24 documents
INSIDE = "##"  # begins a token that continues the one before


def vocabulary() -> dict[str, int]:
    """Id by token."""
    links = (f"<link_{i}>" for i in range(LINKS))
    tokens = [*SPECIAL, *links, *world.words(), *names.FIRST, *(INSIDE + syllable for syllable in names.SECOND)]
    return {token: i for i, token in enumerate(tokens)}


def kvlink(links: int) -> str:
    """The `kvlink` method with these special tokens, as commands write methods: "kvlink:links=4,link_start=6,...".

    links: link tokens per document, from 1. The more there are, the fewer documents have some.
    """
    ids = vocabulary()
    slots, start = LINKS // links, len(SPECIAL)
    markers = {"mem_start": ids[MEM_START], "mem_end": ids[MEM_END]}
    return methods.format(methods.get("kvlink", links=links, link_start=start, slots=slots, **markers))


def build() -> Tokenizer:
    """The tokenizer. Decoding the ids of a text gives the text again. A text gets BOS unless that is turned off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ids = vocabulary()
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix=INSIDE))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(INSIDE, cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, ids[BOS])])
    tokenizer.add_special_tokens([*SPECIAL, *(f"<link_{i}>" for i in range(LINKS))])
    return tokenizer


def write(folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as in a Hugging Face model folder; makes the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    io.write_json(folder / "tokenizer_config.json", config)
