"""Link and memory tokens for KVLink: rows of the embedding that a model has in reserve or is given anew."""

from __future__ import annotations

from typing import Any

from kvgraph.errors import GraphError
from kvgraph.methods import KVLink


def add_link_tokens(hf: Any, links: int, slots: int) -> KVLink:
    """Give a transformers model rows for `links` link tokens a document, `slots` documents, and the two memory tokens.

    The new ids follow those that its embedding has rows for, so no text is ever tokenized to one. Their embeddings are
    drawn around the mean of the others, with torch's random numbers. Returns the method with these ids. Build an
    optimizer or `models.trainable` after this, not before. A model with reserved ids needs none of it: give kvlink those.
    """
    first = hf.get_input_embeddings().weight.shape[0]
    mem_start = first + links * slots
    method = KVLink(links, first if links else None, slots, mem_start, mem_start + 1)
    hf.resize_token_embeddings(mem_start + 2)
    return method


def rows_of(method: KVLink) -> list[int]:
    """The token ids of a method's link and memory tokens, ascending. Raises GraphError if it has none."""
    first = method.link_start or 0
    ids = [*range(first, first + method.links * method.slots)]
    ids += [i for i in (method.mem_start, method.mem_end) if i is not None]
    if not ids:
        raise GraphError("kvlink has neither link nor memory tokens here, so there are no rows of their own to train")
    return sorted(ids)


def train_only_rows(hf: Any, method: KVLink) -> Any:
    """Train the embeddings of the method's tokens and nothing else: a peft model around `hf`.

    Only they reach the optimizer, so neither momentum nor weight decay moves another parameter. `merge_and_unload()`
    of the result gives the ordinary model back, to be saved. To train them beside a LoRA adapter, give its
    configuration `trainable_token_indices=rows_of(method)` instead.
    """
    from peft import TrainableTokensConfig, get_peft_model

    return get_peft_model(hf, TrainableTokensConfig(token_indices=rows_of(method)))
