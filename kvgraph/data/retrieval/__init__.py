"""Finding the passages that a question is about: by words, by embeddings, and along the graph of who reads whom.

`SearchIndex` is what the server, the commands and the evaluation use. `kvgraph.data.retrieval.batch` finds passages for many
questions at once, for training data. All of it is numpy; `kvgraph.models.embedder` has the models that embed.
"""

from kvgraph.data.retrieval.base import Embedder, Hit, Retrievable, RetrievalError
from kvgraph.data.retrieval.index import SearchIndex

__all__ = ["Embedder", "Hit", "Retrievable", "RetrievalError", "SearchIndex"]
