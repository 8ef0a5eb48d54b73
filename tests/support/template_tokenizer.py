"""A tokenizer of single bytes with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte; the template may name any marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<bos>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")
    made.chat_template = template
    return made
