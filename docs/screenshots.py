"""The pictures of the playground and of a report; they need playwright and a chromium.

python docs/screenshots.py                  serves SmolLM2-135M-Instruct with the adapter that ships with kvgraph, asks two
                                            questions, and writes docs/images/playground-{light,dark}.png
python docs/screenshots.py report RUNS      writes docs/images/report.png of the runs that `kvgraph eval --out RUNS` made
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

from kvgraph import demo
from kvgraph.data.tasks import qa

IMAGES = Path(__file__).parent / "images"
PORT = 8799
URL = f"http://127.0.0.1:{PORT}"
CHROMIUM = os.environ.get("KVGRAPH_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def ask(page: Page) -> None:
    """Ask, and wait for both answers."""
    page.click("#send")
    page.wait_for_selector("#stop:not([disabled])")
    page.wait_for_selector("#send:not([disabled])", timeout=600_000)
    page.wait_for_load_state("networkidle")


def shoot(page: Page, name: str) -> None:
    """One picture of the whole page."""
    path = IMAGES / f"playground-{name}.png"
    page.screenshot(path=path, full_page=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def report(runs: Path) -> None:
    """The top of the report's page."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "kvgraph.cli", "report", runs, "--out", page], check=True)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        shown = browser.new_page(viewport={"width": 1440, "height": 1250}, color_scheme="light")
        shown.goto(page.as_uri())
        shown.screenshot(path=IMAGES / "report.png")
        browser.close()


def main() -> None:
    """What the arguments say."""
    if sys.argv[1:2] == ["report"]:
        report(Path(sys.argv[2]))
    else:
        playground()


def playground() -> None:
    """Both pictures of the playground."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model", demo.adapter(), "--store", f"{folder}/kv", "--port", PORT]
        server = subprocess.Popen([sys.executable, "-m", "kvgraph.cli", "serve", *map(str, flags)])
        try:
            while not _ready():
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
                page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
                page.goto(URL)
                page.set_default_timeout(300_000)
                page.click("#demo")
                page.fill("#max-tokens", "24")
                page.fill("#system", qa.INSTRUCTION)  # what the adapter was trained with
                page.select_option("#order", "turn")
                ask(page)
                page.select_option("#examples", index=2)
                ask(page)
                shoot(page, "light")
                page.emulate_media(color_scheme="dark")
                page.get_by_text("Reads of B").click()
                page.locator("g.node.document").nth(4).hover()
                page.wait_for_timeout(300)  # the fade
                shoot(page, "dark")
                browser.close()
        finally:
            server.terminate()
            server.wait()


def _ready() -> bool:
    try:
        return httpx.get(f"{URL}/ready").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
