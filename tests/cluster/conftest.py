"""One Ray for all tests of clusters. Without it they are skipped, and say so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvgraph import demo


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs kvgraph[ray]: nothing of the cluster but its routing is tested")
    import logging

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
    for left in (2, 1, 0):
        try:
            ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)
            break
        except Exception as error:  # it waits for 30 seconds, which may be too few on a busy machine
            ray.shutdown()
            if not left or "timed out" not in str(error):
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    demo.write_model(made)
    return made
