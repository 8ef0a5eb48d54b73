"""`kill -9` of a replica, of an encoding worker and of the Redis tier, each under a load of 32 streams: no answer is wrong
or mixed up, every request ends, and all is well again without a person.

`KVGRAPH_SOAK=1` repeats it 20 times; the code is the same.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from clusters import encoding_workers, kill_replica, replica_of, serving_replicas
from kvgraph import Engine
from kvgraph.data.corpus import CorpusDocument
from kvgraph.encoding import Documents, Done, Encoder, batches
from kvgraph.graph import ContextGraph
from kvgraph.methods import parse
from kvgraph.server.settings import Settings
from kvgraph.store.open import open_store
from remotes import RedisServer, has_redis
from serving import Live, events, metrics, serving, until
from soak import SOAK

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks aren't installed
from benchmarks.serving import Ask, Served, asks, load

pytestmark = [
    pytest.mark.skipif(not has_redis(), reason="no redis-server here: apt-get install redis-server"),
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # Ray's own
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
ROUNDS = 20 if SOAK else 1
STREAMS = 32
TIE = 1e-3  # two tokens with logits this close may change places when other requests share the step
WAIT = 400.0  # seconds that anything may take on a busy machine
GRACE = 120.0  # seconds that a replica may take to end its streams
PAUSED = 4_000  # milliseconds without writes: fewer than a write waits for an answer
BURST = 3.0  # seconds for which each client of a burst asks


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def live(local_ray, model_folder, redis) -> Iterator[Live]:
    """Two replicas that can't keep all documents in memory, and a Redis behind them."""
    from ray import serve

    from kvgraph.cluster.serving import Planner, make_app

    fixed = {"served_name": "model", "kv_budget": 48 << 20, "store": redis.url, "grace": GRACE}
    settings = Settings.load(model=str(model_folder), **fixed)
    serve.start(proxy_location="Disabled")
    handle = deployed(settings, 2)
    app = make_app(settings, lambda given: Planner.of(handle, given))
    with serving(app, WAIT) as url:
        yield Live(app, url)
    serve.shutdown()


def deployed(settings: Settings, count: int | None, **options: Any) -> Any:
    """The handle of so many replicas, once they are there. Those that are there already stay, as with `serve deploy`."""
    from ray import serve

    from kvgraph.cluster.serving import NAME, local_replicas

    bound = local_replicas(settings, 2, **({"num_replicas": count} | options))
    bound._bound_deployment._version = "1"  # `serve.run` gives each deployment another one, and replaces all replicas
    return serve.run(bound, name=NAME, route_prefix=None)


@pytest.fixture(scope="module")
def answers(model_folder) -> dict[Ask, str]:
    """A single engine's answers, of those requests where no token is chosen by rounding."""
    answers = {}
    with Engine.load(model_folder, check=False) as engine:
        for ask in asks(40, tokens=(8, 24)):
            result = ask.answer(engine)
            if all(sampled.top[0][1] - sampled.top[1][1] > TIE for sampled in result.sampled):
                answers[ask] = result.text
    assert len(answers) > 10
    return answers


class Streams:
    """32 streaming clients, until the block ends and each has its last answer. A tenth of them leave early."""

    def __init__(self, url: str, asked: list[Ask], seed: int):
        self.url, self.asked, self.seed = url, asked, seed
        self.served: list[Served] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._ending.is_set():
            self.seed += 1
            asyncio.run(load(self.url, self.asked, STREAMS, BURST, leaving=0.1, seed=self.seed, served=self.served))

    @property
    def begun(self) -> int:
        """Streams in the middle of their answers. None is `closed` before its end."""
        return sum(s.end == "closed" and 0 < len(s.arrivals) < s.ask.tokens for s in self.served[-STREAMS:])

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), f"{sum(s.end == 'closed' for s in self.served)} requests don't end"

    def check(self, answers: dict[Ask, str], *ends: str) -> None:
        """Nobody got another answer than a single engine's, and every stream ended in one of these ways."""
        for s in self.served:
            assert s.end in ends, s
            assert s.end != "error" or "the replica that answered has failed" in s.detail, s
            assert answers[s.ask].startswith(s.text), (s, answers[s.ask])
            assert s.end != "finished" or s.text == answers[s.ask], (s, answers[s.ask])


def corpus(n: int) -> list[CorpusDocument]:
    """A round's own documents."""
    return [CorpusDocument(f"{n:02} {i:02} " + "some words " * (1 + i * 7 % 9), "", str(i)) for i in range(96)]


def encoded(store: str, documents: list[CorpusDocument], model: Path) -> Done:
    """One process encodes what isn't stored."""
    done = Done()
    with Encoder(Documents(parse("block"), ""), [store], model=str(model), check=False) as encoder:
        for batch in batches(documents):
            done.add(encoder.encode(batch))
        encoder.flush()
    return done


def kill_worker() -> None:
    os.kill(random.choice(encoding_workers()), signal.SIGKILL)


def test_nothing_that_is_killed_costs_more_than_its_own_work(live, answers, redis, model_folder, tmp_path, monkeypatch):
    from kvgraph.cluster.encoding import encode_on

    monkeypatch.setattr("kvgraph.encoding.MOST", 4)
    url = live.url
    fingerprint = Engine.load(model_folder, check=False).fingerprint
    ends: Counter[str] = Counter()

    def kill_redis() -> None:
        """Who runs Redis starts it again."""
        redis.kill()
        time.sleep(random.uniform(0, 3))
        redis.start()

    for n in range(ROUNDS):
        random.seed(n)
        documents, done, failures = corpus(n), Done(), []

        def encode(documents: list[CorpusDocument] = documents, done: Done = done, failed: list = failures) -> None:
            try:
                items, loading = Documents(parse("block"), ""), {"model": str(model_folder), "check": False}
                encode_on("auto", items, documents, [redis.url], loading, done, workers=2)
            except BaseException as error:
                failed.append(error)

        encoding = threading.Thread(target=encode, daemon=True)
        with Streams(url, list(answers), seed=1000 * n) as streams:
            encoding.start()
            until(lambda: len(encoding_workers()) == 2, WAIT)
            faults = [lambda: kill_replica(replica_of(url)), kill_worker, kill_redis]
            for fault in random.sample(faults, len(faults)):
                until(lambda: streams.begun >= STREAMS // 4, WAIT)
                fault()
            encoding.join(WAIT)
        assert not encoding.is_alive() and not failures, failures
        assert done.items == len(documents)

        streams.check(answers, "finished", "left", "error")
        ends.update(s.end for s in streams.served)

        # The same command again encodes what Redis lost; then all is there, and right.
        encoded(redis.url, documents, model_folder)
        encoded(str(tmp_path / f"kv-{n}"), documents, model_folder)
        kept, right = open_store(redis.url, fingerprint), open_store(tmp_path / f"kv-{n}", fingerprint)
        for path in (tmp_path / f"kv-{n}").glob("records/*/*.safetensors"):
            (found, _), (expected, _) = kept.get(path.stem), right.get(path.stem)
            for one, other in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

        until(lambda: metrics(url)["kvgraph_replicas"] == 2, WAIT)
        running = {n: v for n, v in metrics(url).items() if n.startswith("kvgraph_replica_requests")}
        assert len(running) == 2 and not any(running.values())
        ask = next(iter(answers))
        body = ask.body() | {"stream": False}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT).json()
        assert answer["choices"][0]["text"] == answers[ask]
    assert ends["finished"] > STREAMS * ROUNDS and ends["error"] > 0, ends


# -- replicas that come and go ------------------------------------------------------------------------------------------


def asked_for(live: Live, count: int | None, **options: Any) -> threading.Thread:
    """Ask for another number of replicas; the thread ends when it is so."""
    thread = threading.Thread(target=deployed, args=(live.server.settings, count), kwargs=options, daemon=True)
    thread.start()
    return thread


def test_a_replica_that_is_taken_away_ends_its_streams_and_writes_what_waits(live, redis):
    """Redis takes no writes until it leaves, and answers reads."""
    from kvgraph.cluster.routes import ROUTES

    until(lambda: metrics(live.url)["kvgraph_replicas"] == 2, WAIT)
    engine, texts, keys = live.server.engine, {}, {}
    for text in (f"the leaving of replica {i}" for i in range(40)):
        key = str(engine.keys(engine.plan(ContextGraph([f"{text}\n\n"], "why?"), "block"))[0])
        texts[ROUTES._router.owner(key)], keys[ROUTES._router.owner(key)] = text, key
    assert len(texts) == 2

    def body(text: str, tokens: int) -> dict[str, Any]:
        return live.body(documents=[{"text": text}], kvgraph={"method": "block"}, max_tokens=tokens, temperature=0)

    def streamed(text: str) -> str:
        answer = httpx.post(f"{live.url}/v1/completions", json=body(text, 60) | {"stream": True}, timeout=WAIT)
        *chunks, last = events(answer.text)
        assert last == "[DONE]", chunks[-1]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])

    redis.client().client_pause(PAUSED, all=False)
    with ThreadPoolExecutor(4) as pool:
        # A document's record waits to be written from its first answer on.
        asked = [pool.submit(live.ask, **body(text, 4)) for text in texts.values()]
        assert all(answer.result(WAIT).status_code == 200 for answer in asked)
        streams = [pool.submit(streamed, text) for text in texts.values()]
        until(lambda: min(ROUTES.loads().values()) == 1, WAIT)
        leaving = asked_for(live, 1)
        told = [stream.result(WAIT) for stream in streams]
    leaving.join(WAIT)
    until(lambda: metrics(live.url)["kvgraph_replicas"] == 1, WAIT)
    until(lambda: len(serving_replicas()) == 1, WAIT)
    # The store here remembers for seconds what wasn't there.
    until(lambda: all(engine.store.get(key) for key in keys.values()), 30)
    assert told == [streamed(text) for text in texts.values()]
    asked_for(live, 2).join(WAIT)


def test_replicas_join_under_load_and_leave_without_it(live, answers):
    ends = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "metrics_interval_s": 1.0}
    asked_for(live, 1).join(WAIT)
    until(lambda: metrics(live.url)["kvgraph_replicas"] == 1, WAIT)
    delays = {"upscale_delay_s": 1.0, "downscale_delay_s": 5.0, "look_back_period_s": 2.0}
    asked_for(live, None, autoscaling_config=ends | delays).join(WAIT)
    with Streams(live.url, list(answers), seed=7) as streams:
        until(lambda: metrics(live.url)["kvgraph_replicas"] == 2, WAIT)
        until(
            lambda: min(v for n, v in metrics(live.url).items() if n.startswith("kvgraph_replica_requests")) > 4, WAIT
        )
    until(lambda: metrics(live.url)["kvgraph_replicas"] == 1, WAIT)
    streams.check(answers, "finished", "left")
    asked_for(live, 2).join(WAIT)
