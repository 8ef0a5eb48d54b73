"""Data sets on the Hugging Face hub: one file of them, or a stream of records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvgraph.data import io
from kvgraph.errors import KVGraphError


class Hub(NamedTuple):
    """Where the full data set is on the hub: `datasets.load_dataset(name, config, split=split)`, or one file of it."""

    name: str
    config: str | None = None
    split: str = "validation"
    file: str | None = None
    revision: str | None = None


def download(hub: Hub, error: io.Error) -> Path:
    """One file of a data set, in the hub's own cache."""
    assert hub.file is not None
    with _reached(hub, error):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub.name, hub.file, repo_type="dataset", revision=hub.revision))


def pinned(hub: Hub, revision: str | None, error: io.Error) -> Hub:
    """The data set at a commit: the given one, or the current one."""
    with _reached(hub, error):
        from huggingface_hub import HfApi

        return hub._replace(revision=revision or HfApi().dataset_info(hub.name, revision=hub.revision).sha)


class HubStream:
    """The records of a data set as they arrive; `state` and `resume` are those of `datasets`."""

    def __init__(self, hub: Hub, error: io.Error, resume: Any = None):
        self.hub, self.error = hub, error
        with _reached(hub, error):
            from datasets import load_dataset

            self._data: Any = load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True)
            if resume is not None:
                self._data.load_state_dict(resume)

    def state(self) -> Any:
        """The position of the stream, to resume from."""
        return self._data.state_dict()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _reached(self.hub, self.error):
            yield from self._data


@contextmanager
def _reached(hub: Hub, error: io.Error) -> Iterator[None]:
    try:
        yield
    except KVGraphError:
        raise
    except ImportError:
        raise error("to read from the hub, install datasets: pip install 'kvgraph[eval]'") from None
    except Exception as failed:  # the libraries' own, requests', ...
        raise error(f"can't get {hub.name} from the hub: {io.first_line(failed)}") from None
