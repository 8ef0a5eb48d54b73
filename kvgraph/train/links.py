"""Link and memory tokens for KVLink: rows of the embedding that a model has in reserve, or that are added to it."""

from __future__ import annotations

from typing import Any

from kvgraph import methods
from kvgraph.errors import GraphError
from kvgraph.methods import Method


def add_link_tokens(hf: Any, links: int, slots: int) -> Method:
    """Add rows to a transformers model: `links` link tokens for each of `slots` documents, and the two memory tokens.

    The new ids come after the existing rows of the embedding, so no text is ever tokenized to one. Their embeddings are
    drawn around the mean of the others, with torch's random numbers. Returns the method with these ids. Build an
    optimizer or `models.trainable` after this, not before. A model with reserved ids doesn't need this: give those to kvlink.
    """
    first = hf.get_input_embeddings().weight.shape[0]
    mem_start = first + links * slots
    ids = {"link_start": first if links else None, "mem_start": mem_start, "mem_end": mem_start + 1}
    method = methods.get("kvlink", links=links, slots=slots, **ids)
    hf.resize_token_embeddings(mem_start + 2)
    return method


def rows_of(method: Method) -> list[int]:
    """The ids of a method's own tokens (kvlink's link and memory tokens), ascending. Raises GraphError if it has none."""
    if not method.own_tokens:
        raise GraphError(f"{methods.format(method)} has no tokens of its own, so there are no rows of theirs to train")
    return list(method.own_tokens)


def train_only_rows(hf: Any, method: Method) -> Any:
    """A peft model around `hf` that trains the embeddings of the method's tokens and nothing else.

    Only these reach the optimizer, so neither momentum nor weight decay moves another parameter. `merge_and_unload()` of
    the result returns the ordinary model, for saving. To train the embeddings together with a LoRA adapter, set
    `trainable_token_indices=rows_of(method)` in its configuration instead.
    """
    from peft import TrainableTokensConfig, get_peft_model

    return get_peft_model(hf, TrainableTokensConfig(token_indices=rows_of(method)))
