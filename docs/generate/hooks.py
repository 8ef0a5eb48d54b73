"""What `mkdocs build` adds to the pages of docs/: the references that come from the code, and files that lie outside.

Pages link to files of the repository as they do on any code host ("../../benchmarks/RESULTS.md"). Those in OUTSIDE become
part of the site, and their links are rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from command_line import fill as fill_commands
from http_api import fill as fill_routes
from mkdocs.structure.files import File, Files
from python_api import pages as api_pages

ROOT = Path(__file__).parents[2]
OUTSIDE = {  # file of the repository -> its place in the site
    "benchmarks/RESULTS.md": "reference/results.md",
    "kvgraph/demo/adapter/README.md": "reference/adapter-card.md",
    "kvgraph/demo/model/README.md": "reference/model-card.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    **{
        f"examples/{path.name}": f"examples/{path.name}"
        for path in sorted((ROOT / "examples").iterdir())
        if path.is_file()
    },
}
GENERATED = {"reference/cli.md": fill_commands, "reference/http.md": fill_routes}
API = "reference/api"  # the entry of the navigation that the API's pages take the place of

LINK = re.compile(r"(\]\()([^)#\s]+)([^)\s]*\))")


def on_config(config: Any) -> Any:
    """Put the pages of the Python API into the navigation."""
    config.nav = _filled(config.nav, [{page.title: f"{API}/{page.file}"} for page in api_pages()])
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the Python API, and the files that lie outside docs/."""
    for page in api_pages():
        files.append(File.generated(config, f"{API}/{page.file}", content=page.text))
    for source, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated, and point links to where their files are in the site."""
    uri = page.file.src_uri
    if uri in GENERATED:
        markdown = GENERATED[uri](markdown)
    places = {place: source for source, place in OUTSIDE.items()}
    return _relinked(markdown, uri, dirname(places.get(uri, f"docs/{uri}")))


def _relinked(markdown: str, uri: str, folder: str) -> str:
    """Links are relative to a folder of the repository; make them relative to the page at `uri`."""

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        file = normpath(join(folder, target))
        place = OUTSIDE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        return found[0] if place is None else f"{before}{relpath(place, dirname(uri) or '.')}{after}"

    return LINK.sub(link, markdown)


def _filled(nav: list[Any], api: list[Any]) -> list[Any]:
    filled = []
    for entry in nav:
        if isinstance(entry, dict):
            (title, value), *_ = entry.items()
            entry = {title: api if value == API else _filled(value, api) if isinstance(value, list) else value}
        filled.append(entry)
    return filled
