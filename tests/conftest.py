"""Settings every test runs under: offline, one thread, and more examples with KVGRAPH_SOAK=1."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test downloads anything
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kvgraph-tests-")  # what tests remember stays theirs
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import certifi  # noqa: E402

# Every client of httpx reads all certificates that it trusts, which takes 25 ms; no test speaks TLS, so one will do.
os.environ["SSL_CERT_FILE"] = os.path.join(os.environ["XDG_CACHE_HOME"], "one.pem")
with open(certifi.where(), encoding="utf-8") as trusted, open(os.environ["SSL_CERT_FILE"], "w") as one:
    one.write(trusted.read().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import commands  # noqa: E402
from soak import SOAK, draws  # noqa: E402

commands.share()
settings.register_profile("ci", deadline=None, max_examples=draws(8, 300))
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # not at the top: the process that hands tests to workers needs none

    from kvgraph import demo

    torch.set_num_threads(1)
    demo.HIDDEN, demo.LAYERS, demo.MLP = 128, 2, 256  # of the random model: a third of the time, and of the same kind
    for item in items:
        if not SOAK and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make soak"))
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays: nobody looks for garbage there again


def pytest_sessionfinish() -> None:
    commands.end()


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    from kvgraph.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return run
