"""The server's rooms: routes that know nothing of each other, and no file that knows which kinds of store there are."""

import ast
import re
from pathlib import Path

import pytest

import kvgraph.server

SERVER = Path(kvgraph.server.__file__).parent
ROUTES = sorted((SERVER / "routes").glob("[!_]*.py"))


def imported(source: str) -> set[str]:
    """Dotted names of all that a module imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def routes_named(source: str) -> set[str]:
    return {name for name in imported(source) if name.startswith("kvgraph.server.routes")}


def store_classes_named(source: str) -> set[str]:
    """Kinds of store that a module asks for by name; the protocol, kvgraph.store.base.Store, is none."""
    return {n for n in imported(source) if n.startswith("kvgraph.store.") and re.search(r"\.\w+Store$", n)}


@pytest.mark.parametrize("path", ROUTES, ids=lambda path: path.stem)
def test_a_route_imports_no_other(path):
    assert routes_named(path.read_text()) == set()


def test_no_file_asks_for_a_kind_of_store():
    assert [path.name for path in SERVER.rglob("*.py") if store_classes_named(path.read_text())] == []


def test_the_checks_see_a_violation():
    assert routes_named("def f():\n    from kvgraph.server.routes import health") == {"kvgraph.server.routes.health"}
    assert routes_named("from kvgraph.server.routes.openai import card") == {"kvgraph.server.routes.openai.card"}
    assert store_classes_named("from kvgraph.store.disk import DiskStore") == {"kvgraph.store.disk.DiskStore"}
    assert store_classes_named("from kvgraph.store.base import Store") == set()
