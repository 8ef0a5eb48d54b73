"""Limits, keys, tenants and the playground in front of two replicas: the single server's tests, and what differs here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvgraph import demo
from kvgraph.server.settings import Settings
from serving import ANNA, BEN, DOCUMENTS, KEYS, Live, serving, until

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from test_playground import (  # noqa: F401  # fixtures, and tests that run here too
    CHROMIUM,
    FLAGS,
    ask,
    expect,
    opened,
    page,
    sync_api,
    test_all_of_it_by_keyboard,
    test_ask_two_methods_over_the_demo_twice,
    test_edges_are_drawn_removed_and_made_by_rules,
    test_errors_are_told_in_their_place,
    test_files_are_served_with_care,
    test_reads_of_a_method_are_shown,
    test_what_others_wrote_stays_text,
)
from test_server_limits import (  # noqa: F401  # these too
    test_a_body_has_its_size,
    test_a_key_has_its_number_of_requests_at_once,
    test_a_key_has_its_rate,
    test_nobody_chooses_a_tenant,
    test_requests_still_being_tokenized_count_too,
    test_the_queue_has_an_end_and_no_tenant_fills_it,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # Ray's own
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
READY = 400.0  # seconds that two replicas may take on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    demo.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def in_front(local_ray, model, tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """Make an application in front of two replicas, the same for all of the module."""
    from ray import serve

    from kvgraph.cluster.serving import NAME, Planner, local_replicas, make_app

    fixed = {"model": str(model), "store": tmp_path_factory.mktemp("cluster") / "kv", "kv_budget": 1 << 28}
    serve.start(proxy_location="Disabled")
    handle = serve.run(local_replicas(Settings.load(grace=5, **fixed), 2), name=NAME, route_prefix=None)

    def made(**settings: Any) -> Any:
        return make_app(Settings.load(**fixed, **settings), lambda given: Planner.of(handle, given))

    yield made
    serve.shutdown()


@pytest.fixture
def live(in_front) -> Iterator[Callable[..., Live]]:
    """Start a server on a thread: live(**settings)."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Live:
            app = in_front(**settings)
            return Live(app, stack.enter_context(serving(app, READY)))

        yield start


@pytest.fixture(scope="module")
def url(in_front) -> Iterator[str]:
    with serving(in_front(), READY) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no chromium: install it, or name one in KVGRAPH_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def test_tenants_share_no_record_on_any_replica(live):
    """Neither in a replica's memory nor in the store: each tenant computes its own, once."""
    server = live(api_keys=KEYS)
    (folder,) = server.server.settings.store

    def records() -> int:
        return len(list(Path(folder.text).rglob("*.safetensors")))

    def computed(headers: dict[str, str]) -> int:
        more = {"documents": DOCUMENTS, "kvgraph": {"method": "graph-kv", "edges": "all"}}
        return server.ask(headers, **more).json()["usage"]["kvgraph"]["document_tokens_computed"]

    before = records()
    first = computed(ANNA)
    assert first > 0 == computed(ANNA)
    until(lambda: records() > before)
    hers = records() - before
    assert computed(BEN) == first and computed(BEN) == 0 == computed(ANNA)
    until(lambda: records() == before + 2 * hers)


def test_stop_ends_the_work_on_the_replica(browser, live):
    server = live()
    with opened(browser, server.url) as page:  # noqa: F811
        expect(page.locator("#model")).to_contain_text("tiny")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "20000")
        page.click("#send")
        expect(page.locator("#answer-A")).not_to_be_empty()
        page.click("#stop")
        expect(page.locator("#column-A .state-text")).to_have_text("stopped")
        until(lambda: not server.server.runner.pending, 30)
        until(lambda: _running(server) == 0, 30)


def _running(server: Live) -> float:
    """KV that requests still hold on the replicas."""
    return sum(value for name, value in server.metrics().items() if name.startswith("kvgraph_kv_pinned_bytes"))


def test_a_key_opens_the_playground_of_a_cluster(browser, live):
    server = live(api_keys=[{"key": "a-secret-key", "tenant": "alice"}])
    with opened(browser, server.url, refused=(401,)) as page:  # noqa: F811
        expect(page.locator("#model")).to_have_text("this server wants an API key")
        page.get_by_label("API key").fill("a-secret-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "4")
        ask(page)
        expect(page.locator("#answer-A")).not_to_be_empty()
