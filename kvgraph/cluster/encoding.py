"""Encoding on a Ray cluster: actors with the model take batches and write records straight to the shared store."""

from __future__ import annotations

import os
import pickle
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvgraph.data.corpus import CorpusDocument
from kvgraph.encoding import Documents, Done, Encoder, Items, PlannedSpans, batches, plan_batches
from kvgraph.errors import KVGraphError
from kvgraph.plan import Plan
from kvgraph.progress import Progress

LOCAL = "local"


def encode_on(
    address: str,
    documents: Documents,
    corpus: Sequence[CorpusDocument],
    store: Sequence[str],
    loading: dict[str, Any],
    done: Done,
    workers: int,
    gpus: float = 0,
) -> None:
    """Encode a corpus with so many processes, as one process does. What they did is added to `done` as it comes in.

    address: of a Ray cluster, or "local" to start one here for the time. gpus: of each process. A worker that is lost
    costs its batch, which another one encodes again. Raises KVGraphError, also the one that ended a worker's batch.
    """
    with connected(address), Progress("encoding", len(corpus)) as bar:
        run_level(documents, list(batches(corpus)), store, loading, done, workers, gpus, bar)


def encode_levels(
    address: str,
    store: Sequence[str],
    loading: dict[str, Any],
    workers: int,
    gpus: float,
    levels: Sequence[Sequence[Plan]],
) -> Done:
    """Encode the spans of plans, see `kvgraph.encoding.levels`: a level is stored before the next begins."""
    done = Done()
    with connected(address), Progress("encoding", sum(map(len, levels))) as bar:
        for level in levels:
            run_level(PlannedSpans(), list(plan_batches(level)), store, loading, done, workers, gpus, bar)
    return done


def run_level(
    items: Items,
    work: Sequence[Sequence[Any]],
    store: Sequence[str],
    loading: dict[str, Any],
    done: Done,
    workers: int,
    gpus: float,
    bar: Progress,
) -> None:
    """Encode batches in any order. They need nothing of each other."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rates: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # tokens and seconds of each worker
    given = ray.data.from_items([{"batch": pickle.dumps(batch)} for batch in work], override_num_blocks=len(work))
    made = given.map_batches(
        _Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(work)), max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(items, [_reachable(place) for place in store], loading),
        num_gpus=gpus or None,
        num_cpus=1,
        zero_copy_batch=True,
    )
    for row in made.iter_rows():
        worker, one, error = pickle.loads(row["done"])
        if error is not None:
            raise error
        done.add(one)
        rates[worker][0] += one.computed
        rates[worker][1] += one.seconds
        bar.advance(one.items)
        bar.show(note=" ".join(f"{n / max(s, 1e-9):,.0f}" for n, s in rates.values()) + " tokens/s by worker")
    for worker, (tokens, seconds) in sorted(rates.items()):
        bar.say(f"{worker}: {tokens:,.0f} tokens, {tokens / max(seconds, 1e-9):,.0f} tokens/s")


class _Worker:
    """An actor that encodes."""

    def __init__(self, items: Items, store: Sequence[str], loading: dict[str, Any]):
        self.encoder = Encoder(items, store, **loading)
        self.name = f"worker {os.uname().nodename}/{os.getpid()}"

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        told = []
        for batch in rows["batch"]:
            started, one, error = time.perf_counter(), Done(), None
            try:
                one = self.encoder.encode(pickle.loads(batch))
                one.stored += self.encoder.flush()
            except KVGraphError as ended:  # it would end this batch on every other worker too
                error = ended
            one.seconds = time.perf_counter() - started
            told.append(pickle.dumps((self.name, one, error)))
        return {"done": told}


def connect(address: str) -> bool:
    """Let this process belong to a Ray cluster until it ends; False if it did already. Raises KVGraphError."""
    try:
        import ray
    except ModuleNotFoundError:
        raise KVGraphError("a cluster needs Ray; install it with: pip install 'kvgraph[ray]'") from None
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"include_dashboard": False}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for machines that do other work
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", **options)
    except Exception as error:  # Ray has no class for what can be wrong
        raise KVGraphError(f"can't use the Ray cluster {address!r}: {error}") from None
    return True


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A block in which this process belongs to a Ray cluster, see `connect`."""
    ours = connect(address)
    try:
        yield
    finally:
        if ours:
            import ray

            ray.shutdown()


def _reachable(place: str) -> str:
    """A store's place as workers find it, who have other working folders."""
    return place if "://" in place else str(Path(place).absolute())
