"""The playground in a real browser, against a live server: what a person does, and what the API says to the same requests."""

from __future__ import annotations

import os
import re
import shutil
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from kvgraph import demo
from kvgraph.server import playground
from serving import application, serve, serving

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the playground's tests need playwright: pip install playwright"
)
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a busy machine draws late

CHROMIUM = os.environ.get("KVGRAPH_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOSTILE = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: install it, or name one in KVGRAPH_CHROMIUM"),
    pytest.mark.filterwarnings("ignore:this model doesn't declare tuning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    demo.write_model(folder, seed=2)  # with which an answer goes on for thousands of tokens
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    with serve(model, store=tmp_path_factory.mktemp("store") / "kv") as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, *, refused=(), **context):
    """The page in a context of its own. Nothing may leave the server's origin or land on the console as an error, except
    answers with a status in `refused`."""
    with browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}) as session:
        page = session.new_page()
        page.set_default_timeout(20_000)
        elsewhere, complaints = [], []
        page.on("request", lambda r: None if r.url.startswith(url) else elsewhere.append(r.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def heard(message):
            status = re.search(r"status of (\d+)", message.text)
            if message.type == "error" and not (status and int(status[1]) in refused):
                complaints.append(message.text)

        page.on("console", heard)
        page.goto(url)
        yield page
        assert elsewhere == []
        assert complaints == []


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        yield page


def paste(page, *texts):
    """Add documents by the dialog."""
    page.click("#paste")
    page.fill("#paste-text", "\n---\n".join(texts))
    page.click("#paste-dialog button[value=add]")
    expect(page.locator("#document-list > li")).to_have_count(len(texts))


def node(page, number):
    """The box of a document, counted from 1."""
    return page.locator("g.node.document").nth(number - 1)


def drawn(page):
    """The arrows of the drawing, as numbers of documents (source, reader)."""
    ids = [box.get_attribute("data-id") for box in page.locator("g.node.document").all()]
    lines = page.locator("g.line").evaluate_all("ls => ls.map(l => [l.dataset.source, l.dataset.reader])")
    return sorted((ids.index(s) + 1, ids.index(r) + 1) for s, r in lines if s in ids and r in ids)


def connect(page, source, reader):
    """An edge by two clicks on the drawing."""
    node(page, source).click()
    expect(page.locator("#hint")).to_contain_text("Now choose who reads")
    node(page, reader).click()


def ask(page):
    page.click("#send")  # disables it before the click returns
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)


def states(page, letter):
    """What the drawing says of one method's versions, a word a document."""
    return page.locator(f"rect.state[data-method={letter}]").evaluate_all("all => all.map(r => r.dataset.state)")


def tokens(page, letter, kind):
    value = page.locator(f"#column-{letter} .tokens li[data-kind={kind}]").get_attribute("data-value")
    return int(value or -1)


def shown(text):
    """How the page writes an answer."""
    return "".join("·" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def test_ask_two_methods_over_the_demo_twice(page, url):
    page.click("#demo")
    expect(page.locator("g.node.document")).to_have_count(10)
    names = [d.name for d in demo.documents()]
    cited = sorted((names.index(str(s)) + 1, names.index(str(r)) + 1) for s, r in demo.citations())
    assert drawn(page) == cited

    connect(page, 5, 7)
    page.focus("#edge-source")
    page.keyboard.type("Marie Curie")
    page.keyboard.press("Tab")
    page.keyboard.type("Lise Meitner")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#edge-list li")).to_have_count(len(cited) + 2)
    assert drawn(page) == sorted([*cited, (5, 7), (1, 10)])

    page.select_option("#method-A", "block")
    page.select_option("#method-B", "graph-kv")
    page.fill("#max-tokens", "8")
    expect(page.locator("rect.state[data-method=B][data-state=miss]")).to_have_count(10)
    assert states(page, "A") == ["miss"] * 10

    ask(page)
    documents = playground.data()["documents"]
    for letter, kvgraph in {
        "A": {"method": "block"},
        "B": {"method": "graph-kv", "edges": [[s - 1, r - 1] for s, r in drawn(page)]},
    }.items():
        body = {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": page.input_value("#system")},
                {"role": "user", "content": page.input_value("#question")},
            ],
            "documents": documents,
            "kvgraph": kvgraph,
            "max_tokens": 8,
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
        assert page.locator(f"#answer-{letter}").text_content() == shown(answer["content"])
        assert tokens(page, letter, "computed") > 0
        expect(page.locator(f"#column-{letter} .figures")).to_contain_text(re.compile(r"TTFT[\d.]+ m?s"))
    expect(page.locator("rect.state[data-state=memory]")).to_have_count(20)
    first = page.locator("#answer-B").text_content()

    ask(page)
    assert page.locator("#answer-B").text_content() == first
    for letter in "AB":
        assert tokens(page, letter, "computed") == 0
        assert tokens(page, letter, "memory") > 3000
    assert page.locator("#runs tr").evaluate_all("all => all.map(r => r.dataset.cache)")[:2] == ["warm", "warm"]


def middle(page, edge: int) -> list[float]:
    """Where on the screen an edge's middle is, once the drawing stands still."""
    seen: list[list[float]] = [[], []]
    while seen[-1] != seen[-2] or not seen[-1]:
        page.wait_for_timeout(500)
        seen.append(
            page.locator("g.line path.reach")
            .nth(edge)
            .evaluate(
                "p => { const m = p.getPointAtLength(p.getTotalLength() / 2), at = p.getScreenCTM();"
                " return [m.x * at.a + at.e, m.y * at.d + at.f] }"
            )
        )
        assert len(seen) < 40, seen
    return seen[-1]


def test_edges_are_drawn_removed_and_made_by_rules(page):
    paste(page, "# One\nfirst", "# Two\nsecond", "third")
    expect(page.locator("#document-list .name")).to_have_text(["One", "Two", "third"])
    page.select_option("#shape", "chain")
    page.click("#builder button")
    expect(page.locator("#edge-list li")).to_have_count(2)
    assert drawn(page) == [(1, 2), (2, 3)]

    connect(page, 3, 1)  # now a cycle
    expect(page.locator("#edge-list li")).to_have_count(3)
    connect(page, 3, 1)
    expect(page.locator("#hint")).to_contain_text("reads “third” already")
    page.mouse.click(*middle(page, 2))
    expect(page.locator("#edge-list li")).to_have_count(2)
    assert drawn(page) == [(1, 2), (2, 3)]
    page.get_by_label("Remove the edge One to Two").press("Enter")
    expect(page.locator("#edge-list li")).to_have_count(1)

    page.select_option("#shape", "star")
    page.fill("#shape-value", "2")
    page.press("#shape-value", "Enter")
    expect(page.locator("#edge-list li")).to_have_count(2)
    assert drawn(page) == [(1, 2), (3, 2)]
    page.get_by_label("Remove Two").click()
    expect(page.locator("#edge-list li")).to_have_count(0)
    assert drawn(page) == []


def box(drawn):
    """Where something is drawn; for a moment it isn't, whenever the graph is drawn anew."""
    for _ in range(100):
        if (found := drawn.bounding_box()) is not None:
            return found
        time.sleep(0.05)
    raise AssertionError("it isn't drawn")


def test_boxes_move_and_edges_follow(page):
    paste(page, "one", "two")
    connect(page, 1, 2)
    before, line = box(node(page, 1)), page.locator("path.edge").get_attribute("d")
    x, y = before["x"] + before["width"] / 2, before["y"] + 12
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=4)
    page.mouse.up()
    after = box(node(page, 1))
    assert (round(after["x"] - before["x"]), round(after["y"] - before["y"])) == (60, 40)
    assert page.locator("path.edge").get_attribute("d") != line
    expect(page.locator("g.node.picked")).to_have_count(0)  # a drag is no click


def test_reads_of_a_method_are_shown(page):
    paste(page, "one", "two", "three")
    page.get_by_text("Reads of A").click()  # full: one causal chain
    expect(page.locator("g.line")).to_have_count(3 + 4 + 3)  # documents, question, prefix
    assert drawn(page) == [(1, 2), (1, 3), (2, 3)]
    node(page, 2).hover()
    expect(page.locator("#details")).to_contain_text("reads one")
    expect(page.locator("g.line.active")).to_have_count(4)  # one, three, prefix, question
    page.select_option("#method-A", "block")
    expect(page.locator("g.line")).to_have_count(4)
    assert drawn(page) == []


def test_all_of_it_by_keyboard(page):
    page.focus("#demo")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # add one
    page.keyboard.type("Title")
    page.keyboard.press("Tab")
    page.keyboard.type("A short text.")
    page.focus("#add")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("Another.")
    node(page, 1).focus()
    expect(page.locator("#details")).to_contain_text("Title")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#edge-list li")).to_have_count(1)
    assert drawn(page) == [(1, 2)]
    page.fill("#max-tokens", "2")
    page.focus("#question")
    page.keyboard.type("Why?")
    page.keyboard.press("Enter")
    expect(page.locator("#runs tr")).to_have_count(2)


def test_every_control_has_a_name(page):
    paste(page, "one", "two")
    connect(page, 1, 2)
    nameless = """() => [...document.querySelectorAll('input, select, textarea, button, summary, [role=button], section')]
        .filter(e => !(e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_what_others_wrote_stays_text(browser, url):
    name = "hostile-segment"
    httpx.put(f"{url}/v1/segments", json={"id": name, "title": HOSTILE, "text": HOSTILE}).raise_for_status()
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        page.click("#stored")
        page.get_by_label(HOSTILE).check()
        page.click("#stored-dialog button[value=add]")
        page.click("#add")
        page.get_by_label("Title").fill(HOSTILE)
        page.fill("#document-list textarea", HOSTILE)
        connect(page, 1, 2)
        page.fill("#question", HOSTILE)
        page.fill("#max-tokens", "2")
        ask(page)
        node(page, 2).hover()
        expect(page.locator("#edge-list .name")).to_have_text([HOSTILE, HOSTILE])
        expect(page.locator("#details h3")).to_have_text(HOSTILE)
        expect(page.locator("#document-list .name")).to_have_text([HOSTILE, HOSTILE])
        expect(page.locator("#runs td.long").first).to_have_text(HOSTILE)
        assert page.locator("img").count() == 1  # the page's own
        assert page.evaluate("window.harmed") is None


def test_light_dark_and_narrow(browser, url):
    def lightness(page):
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    def fits(page):
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def apart(page):
        boxes = page.locator("g.node.document .back").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height])"
        )
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        return len(boxes) == 10 and all(abs(a[0] - b[0]) >= a[2] or abs(a[1] - b[1]) >= a[3] for a, b in pairs)

    with opened(browser, url, color_scheme="dark") as page:
        assert lightness(page) < 60
        page.get_by_role("button", name="Switch to light colours").click()
        assert lightness(page) > 200
        page.reload()
        assert lightness(page) > 200  # it is remembered
    with opened(browser, url, color_scheme="light", viewport={"width": 400, "height": 800}) as page:
        assert lightness(page) > 200
        page.click("#demo")
        expect(page.locator("g.node.document")).to_have_count(10)
        assert fits(page)
        assert apart(page)
    with opened(browser, url, viewport={"width": 1280, "height": 800}) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        page.click("#demo")
        assert fits(page) and apart(page)  # layers
        page.click("#builder button")  # all pairs
        expect(page.locator("#edge-list li")).to_have_count(90)
        page.click("#column-B summary")
        assert fits(page) and apart(page)  # a ring


def test_errors_are_told_in_their_place(browser, url):
    with opened(browser, url, refused=(400,)) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        paste(page, "one", "two")
        page.select_option("#shape", "top-k")
        page.fill("#shape-value", "many")
        page.press("#shape-value", "Enter")
        expect(page.locator("#hint")).to_contain_text("give all, chain")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "40000")
        expect(page.locator("#column-A .error")).to_contain_text("the model's limit is 32768")
        page.click("#send")
        for column in "AB":  # an error that comes after the next edit would stay
            expect(page.locator(f"#column-{column} .state-text")).to_have_text("failed")
        page.fill("#max-tokens", "2")
        expect(page.locator("#column-A .error")).to_be_hidden()
        page.select_option("#method-B", "kvlink")
        page.click("#column-B summary")
        page.get_by_label("links", exact=True).fill("3")
        expect(page.locator("#column-B .error")).to_contain_text("needs link_start")
        page.get_by_label("link_start").fill("1")
        expect(page.locator("#column-B .error")).to_be_hidden()
        ask(page)
        expect(page.locator("#runs tr")).to_have_count(2)
        expect(page.locator("#runs tr[data-letter=B]")).to_contain_text("kvlink, links 3, link_start 1")


def test_an_error_in_the_middle_of_an_answer_stays_to_be_read(browser, model):
    with serve(model, timeout=1) as url, opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "20000")
        with page.expect_response("**/v1/plan"):  # the plan that is looked at once more after a run
            ask(page)
        expect(page.locator("#column-A .error")).to_contain_text("longer than its deadline")
        expect(page.locator("#answer-A")).not_to_be_empty()
        expect(page.locator("#runs tr")).to_have_count(0)


def test_stop_ends_the_work(browser, model):
    app = application(model)
    with serving(app) as url, opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "20000")
        page.click("#send")
        expect(page.locator("#answer-A")).not_to_be_empty()
        page.click("#stop")
        expect(page.locator("#column-A .state-text")).to_have_text("stopped")
        expect(page.locator("#column-B .state-text")).to_have_text("stopped")
        deadline = time.monotonic() + 10
        while app.state.server.runner.pending:
            assert time.monotonic() < deadline, "the server goes on"
            time.sleep(0.02)
        assert page.locator("#answer-A").text_content() != ""  # what came stays
        expect(page.locator("#send")).to_be_enabled()


def test_a_key_opens_a_server_with_keys(browser, model):
    keys = [{"key": "a-secret-key", "tenant": "alice"}]
    with serve(model, api_keys=keys) as url, opened(browser, url, refused=(401,)) as page:
        expect(page.locator("#model")).to_have_text("this server wants an API key")
        page.get_by_label("API key").fill("wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("this server wants an API key")
        page.get_by_label("API key").fill("a-secret-key")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("tiny")
        page.reload()
        expect(page.locator("#model")).to_contain_text("tiny")  # the tab keeps it


def test_a_model_without_a_chat_template(browser, model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with serve(plain) as url, opened(browser, url) as page:
        expect(page.locator("#system-label")).to_contain_text("no chat template")
        paste(page, "one", "# T\ntwo")
        page.fill("#system", "Facts:\n")
        page.fill("#question", "Why?")
        page.fill("#max-tokens", "6")
        ask(page)
        body = {
            "model": "plain",
            "prompt": "Why?",
            "documents": [{"text": "one"}, {"title": "T", "text": "two"}],
            "kvgraph": {"method": "full", "prefix": page.input_value("#system")},
            "max_tokens": 6,
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]
        assert page.locator("#answer-A").text_content() == shown(answer)


def test_files_are_served_with_care(url):
    page = httpx.get(url)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert httpx.get(url, headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    assert httpx.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    assert httpx.head(url).status_code == 200
    for name in playground.FILES:
        answer = httpx.get(f"{url}/playground/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert "://" not in re.sub(r"http://www\.w3\.org/\S+", "", answer.text), f"{name} names another host"
    for path in ("nothing.js", "__init__.py", "..%2f__init__.py", "%2e%2e/__init__.py"):
        assert httpx.get(f"{url}/playground/{path}").status_code == 404


def test_the_package_brings_every_file():
    folder = Path(playground.__file__).parent
    there = {p.name for p in folder.iterdir() if p.is_file() and p.suffix != ".py"}
    assert there == set(playground.FILES)
    packaged = (folder.parents[2] / "pyproject.toml").read_text()
    assert all(f'"*{Path(name).suffix}"' in packaged for name in there)
