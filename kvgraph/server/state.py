"""The server's state, and what every route needs: the caller, the limits, and the served model."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from kvgraph import methods
from kvgraph.data.library import LIBRARY, Library
from kvgraph.data.retrieval.stored import GraphIndexes
from kvgraph.engine.engine import Engine, load_model
from kvgraph.errors import KVGraphError
from kvgraph.garbage import never_collected
from kvgraph.methods import Method
from kvgraph.models.embedder import SentenceEmbedder
from kvgraph.places import StorePlace
from kvgraph.server import logs
from kvgraph.server.encode import GraphEncoder
from kvgraph.server.errors import APIError
from kvgraph.server.metrics import Metrics
from kvgraph.server.responses.kept import Kept
from kvgraph.server.runner import EngineThread, Watch
from kvgraph.server.settings import Settings, SettingsError
from kvgraph.server.shadow import Shadow
from kvgraph.server.tenants import Caller, Tenants
from kvgraph.server.tokens import TokenNames
from kvgraph.server.tracing import Tracing
from kvgraph.server.workers import Workers
from kvgraph.store.codecs.registry import fingerprint_with, parse
from kvgraph.store.open import open_store

log = logging.getLogger("kvgraph.server")

T = TypeVar("T")


def load_engine(settings: Settings) -> Engine:
    """The engine that the settings describe; its model has passed the gate. Raises KVGraphError."""
    model = load_model(
        settings.model,
        adapter=settings.adapter,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        allow_untested=settings.allow_untested,
    )
    if model.tokenizer is None:
        raise SettingsError(f"{settings.model} has no tokenizer, but a server needs one; give a model with one")
    if settings.chat_template is not None:
        try:
            model.tokenizer.chat_template = settings.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"can't read the chat template {settings.chat_template}: {error}") from None
    store = None
    if settings.store:
        fingerprint = fingerprint_with(model.fingerprint, parse(settings.codec))
        places = [place.text for place in settings.store]
        store = open_store(places, fingerprint, capacity_bytes=settings.store_size)
    engine = Engine(
        model,
        store=store,
        kv_budget=settings.kv_budget,
        host_budget=settings.host_budget or 0,
        max_step_tokens=settings.max_step_tokens,
        codec=settings.codec,
    )
    never_collected()
    return engine


def library_place(settings: Settings) -> Path | StorePlace | None:
    """Where segments and graphs are kept, whatever the store's tiers are: a file, or a database by its URL. None: in memory."""
    if settings.library is not None or settings.folder is None:
        if settings.library is None and settings.store:
            log.warning(
                "segments and graphs are in memory, because no tier of the store is a folder; give --library FILE"
            )
        if settings.library is None or settings.library.is_url:
            return settings.library
        return Path(settings.library.text)
    return settings.folder / LIBRARY


class Server:
    """One model being served. Made at once; ready when `load` (see `load_engine`) has given an engine.

    run: makes what drives the engine, from the engine and a function that is called with every update.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Settings], Engine] = load_engine,
        run: Callable[[Engine, Watch], EngineThread] = EngineThread,
    ):
        self.settings = settings
        self.tenants = Tenants(settings.api_keys)
        self.tracing = Tracing(settings)
        self.metrics = Metrics(settings.name, lambda: self.ready)
        self.workers = Workers()
        self.responses = Kept(settings.max_kept_bytes)
        self.started = time.time()
        self.failure: BaseException | None = None  # why loading failed
        self.on_failure: Callable[[], None] = lambda: None
        self.closing = False  # whether new requests are refused, for good
        self._choices: Counter[str] = Counter()  # of requests that were let in and haven't ended, by tenant
        self._load, self._run = load, run
        self._engine: Engine | None = None
        self._runner: EngineThread | None = None
        self._library: Library | None = None
        self._indexes: GraphIndexes | None = None
        self._encoder: GraphEncoder | None = None
        self._shadow: Shadow | None = None
        self._loading: asyncio.Task | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model, beside the running event loop."""
        self._loading = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            engine = await _on_daemon(lambda: self._load(self.settings))
            place = library_place(self.settings)
            self._library = await asyncio.to_thread(Library, place, engine.model.fingerprint)
            folder = place.parent if isinstance(place, Path) else None
            self._indexes = GraphIndexes(self._library, folder, SentenceEmbedder)
            runner = self._run(engine, self.metrics.saw)
            runner.start()
            self.metrics.observe(runner)
            self._engine, self._runner = engine, runner
            self._encoder = GraphEncoder(runner, self._library, self.workers)
            self._shadow = Shadow(runner, self.workers, self.metrics, self.settings.shadow)
            await self._encoder.resume()
        except Exception as error:
            self.failure = error
            log.error("can't serve %s: %s", self.settings.model, error, exc_info=not isinstance(error, KVGraphError))
            self.on_failure()
            return
        log.info("serving %s by default with %s", self.settings.name, self.method.name)

    async def drain(self) -> None:
        """Take no more work, and end what is running: by itself within `grace` seconds, then with an error. Idempotent."""
        self.closing = True
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._encoder is not None:
            await self._encoder.stop()
        if self._shadow is not None:
            await self._shadow.stop()
        deadline = time.monotonic() + self.settings.grace
        while self.in_work and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._runner is not None:
            await self._runner.stop()

    async def stop(self) -> None:
        """Drain, write what is pending, let go of the model."""
        await self.drain()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        if self._library is not None:
            await asyncio.to_thread(self._library.close)
        if self._indexes is not None:
            await asyncio.to_thread(self._indexes.close)
        await self.tracing.close()
        self.workers.close()

    @property
    def ready(self) -> bool:
        """Whether requests can be answered: the model is loaded, passed its gate, and its engine thread is alive."""
        return self._runner is not None and self._runner.takes_work and not self.closing

    @property
    def in_work(self) -> int:
        """Choices of requests that were let in and haven't ended."""
        return self._choices.total()

    @property
    def failed(self) -> BaseException | None:
        """What ended loading or the engine thread for good."""
        return self.failure or (self._runner.failed if self._runner is not None else None)

    @property
    def engine(self) -> Engine:
        """The engine. Raises APIError 503 while there is none."""
        return _loaded(self._engine)

    @property
    def runner(self) -> EngineThread:
        """The thread that drives the engine. Raises APIError 503 while there is none."""
        return _loaded(self._runner)

    @property
    def library(self) -> Library:
        """Stored segments and graphs. Raises APIError 503 while there is no engine to encode them with."""
        return _loaded(self._library)

    @property
    def indexes(self) -> GraphIndexes:
        """The search indexes of stored graphs. Raises APIError 503 while there is no engine."""
        return _loaded(self._indexes)

    @property
    def encoder(self) -> GraphEncoder:
        """What encodes stored graphs. Raises APIError 503 while there is no engine."""
        return _loaded(self._encoder)

    @property
    def shadow(self) -> Shadow:
        """What compares answers with `full`. Raises APIError 503 while there is no engine."""
        return _loaded(self._shadow)

    # -- what is served -----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.model.tokenizer

    @cached_property
    def tokens(self) -> TokenNames:
        """What single tokens of it stand for."""
        return TokenNames(self.tokenizer)

    @property
    def method(self) -> Method:
        """The default method: the setting, else the first that the model declares tuning for, else full."""
        return methods.resolve(self.settings.method, self.engine.model.tuned_for)

    def require_name(self, name: str) -> None:
        """Raise APIError 404 unless this is the served model's name."""
        if name != self.settings.name:
            raise APIError(
                404,
                f"there is no model {name!r} here; this server has {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, caller: Caller, choices: int, held: AsyncExitStack) -> None:
        """Let a request in; what it holds until its end goes on the stack. Raises APIError 400, 429 or 503.

        At most `max_pending` choices are in work or waiting, and where there are several tenants at most half of them
        belong to one tenant, so that none can shut out the others.
        """
        if choices > self.settings.max_choices:
            raise APIError(400, f"{choices} choices, but at most {self.settings.max_choices} are made", param="n")
        if self.closing or not self.runner.takes_work:
            raise APIError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        most = self.settings.max_pending
        if self.in_work + choices > most:
            raise APIError(429, "too many requests are waiting; try again", code="overloaded", retry_after=1)
        if self.tenants.several and self._choices[caller.tenant] + choices > max(1, most // 2):
            raise APIError(429, "too many of your requests are waiting; try again", code="overloaded", retry_after=1)
        caller.count_request()
        held.enter_context(caller.slot())
        held.enter_context(self._counted(caller.tenant, choices))

    @contextmanager
    def _counted(self, tenant: str, choices: int) -> Iterator[None]:
        self._choices[tenant] += choices
        try:
            yield
        finally:
            self._choices[tenant] -= choices

    def deadline(self, timeout: float | None) -> float:
        """When a request that comes now must be done, in event loop time."""
        return asyncio.get_running_loop().time() + min(timeout or self.settings.timeout, self.settings.timeout)


def _loaded(part: T | None) -> T:
    """What is there once the model is loaded. Raises APIError 503 before."""
    if part is None:
        raise APIError(503, "the model is being loaded; see /ready", code="not_ready", retry_after=2)
    return part


async def _on_daemon(work: Callable[[], T]) -> T:
    """Run something on a thread that the end of the process doesn't wait for, however long it takes."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="kvgraph-loader", daemon=True).start()
    return await asyncio.wrap_future(future)


bearer = HTTPBearer(auto_error=False, description="An API key, when the server has any.")


async def server_of(request: Request) -> Server:
    """The server of an application's request."""
    return request.app.state.server


async def authenticated(
    server: Annotated[Server, Depends(server_of)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """Who asks. Raises APIError 401."""
    caller = server.tenants.caller(None if credentials is None else f"{credentials.scheme} {credentials.credentials}")
    exchange = logs.current.get()
    if exchange is not None:
        exchange.tenant = caller.tenant
    return caller


TheServer = Annotated[Server, Depends(server_of)]
TheCaller = Annotated[Caller, Depends(authenticated)]
