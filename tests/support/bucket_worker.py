"""A process that keeps a model's and a tenant's records in a store: `bucket_worker.py URL TENANT WIDTH`.

It prints the fingerprint, then the keys of what its store lists. WIDTH makes the model another one.
"""

from __future__ import annotations

import sys

import families
from kvgraph import Engine, SamplingParams, models
from kvgraph.graph import ContextGraph

DOCUMENTS = 4


def main() -> None:
    url, tenant, width = sys.argv[1:]
    model = models.wrap(families.build("Llama", intermediate_size=int(width)))
    graph = ContextGraph([[(7 * i + j) % 120 for j in range(24)] for i in range(DOCUMENTS)], query=[3, 5])
    with Engine(model, store=url, salt=tenant) as engine:
        engine.generate(graph, "block", SamplingParams(max_tokens=2, ignore_eos=True))
        engine.flush()
        assert engine.store is not None and engine.store_error is None, engine.store_error
        print(engine.fingerprint, *(key for key, _ in engine.store.for_tenant(tenant).records()))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
