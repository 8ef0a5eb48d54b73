"""Imports go one way: graph -> plan -> methods; rope, models, attention, store -> engine -> train, eval, server, cli.

Read from the source, so imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvgraph"

# What each module or package directly under kvgraph/ may import from kvgraph. A new one must be given its place here.
TEXT = {"errors", "graph", "plan", "explain", "methods"}
TENSORS = {"memo", "rope", "store", "attention", "models"}
ENGINE = {"engine"} | TEXT | TENSORS
DATA = {"corpus", "chat", "data", "demo"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "graph": {"errors"},
    "plan": {"errors", "explain"},  # explain: only for __str__, inside the function
    "explain": {"errors", "plan"},
    "methods": {"errors", "graph", "plan"},
    "memo": set(),
    "rope": {"errors"},
    "store": {"errors"},
    "attention": {"errors", "rope", "store"},
    "models": {"errors", "memo", "rope", "store", "attention"},
    "engine": TEXT | TENSORS,
    "corpus": {"errors", "graph"},
    "chat": {"errors", "graph"},
    "data": {"errors", "graph", "corpus"},
    "demo": ENGINE | {"corpus"},
    "__init__": ENGINE,
    "train": ENGINE | DATA | {"__init__", "eval"},
    "eval": ENGINE | DATA | {"__init__"},
    "server": ENGINE | DATA | {"__init__"},
    "cli": ENGINE | DATA | {"__init__", "train", "eval", "server"},
}
# Libraries that only these may import; whatever else imports them would drag a model library into text-only work.
ONLY_IN = {
    "transformers": {"models"},
    "torch": set(MAY_IMPORT) - TEXT - {"corpus", "chat", "__init__"},
}


def unit(module: str) -> str:
    """The module or package directly under kvgraph/ that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full dotted names of everything a module's source imports, relative imports resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            if base == "kvgraph":  # `from kvgraph import plan` names a module, `from kvgraph import Engine` the package
                names.update(f"kvgraph.{a.name}" if a.name in MAY_IMPORT else "kvgraph" for a in node.names)
            else:
                names.add(base)
    return names


def violations(sources: dict[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """What breaks a rule in {module: source}; `packages` are the modules that are an __init__.py."""
    found = []
    for module, source in sources.items():
        here = unit(module)
        if here not in MAY_IMPORT:
            found.append(f"{module}: {here!r} has no place in MAY_IMPORT; give it one")
            continue
        for name in sorted(imported(source, module, module in packages)):
            top = name.split(".")[0]
            if top == "kvgraph":
                if unit(name) not in MAY_IMPORT[here] | {here}:
                    found.append(f"{module} imports {name}, but {here} may import only {sorted(MAY_IMPORT[here])}")
            elif here not in ONLY_IN.get(top, {here}):
                found.append(f"{module} imports {name}, which only {sorted(ONLY_IN[top])} may")
    return found


def test_the_package_keeps_the_rules():
    sources, packages = {}, set()
    for path in PACKAGE.rglob("*.py"):
        parts = ("kvgraph", *path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    assert {"kvgraph", "kvgraph.plan", "kvgraph.engine.engine"} <= set(sources)
    assert violations(sources, frozenset(packages)) == []


def test_the_table_has_no_cycles():
    """Besides plan <-> explain, which is stated; so "one way" can't be given up by editing a line."""
    left = {name: set(may) for name, may in MAY_IMPORT.items()}
    left["plan"].discard("explain")
    while free := [name for name, may in left.items() if not may & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvgraph.plan", "import torch"),
        ("kvgraph.methods.full", "from torch import Tensor"),
        ("kvgraph.graph", "def f():\n    import transformers"),
        ("kvgraph.explain", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch.nn"),
        ("kvgraph.engine.engine", "from transformers import AutoModel"),
        ("kvgraph.store.disk", "import transformers.utils"),
        ("kvgraph.graph", "from kvgraph.plan import Plan"),
        ("kvgraph.plan", "from kvgraph import methods"),
        ("kvgraph.plan", "from .methods import get"),
        ("kvgraph.methods.full", "from ..engine import engine"),
        ("kvgraph.rope", "import kvgraph.models"),
        ("kvgraph.attention.rows", "from kvgraph.engine.scheduler import Scheduler"),
        ("kvgraph.engine.engine", "from kvgraph.cli import main"),
        ("kvgraph.engine.engine", "def f():\n    from kvgraph.server import app"),
        ("kvgraph.server.app", "from kvgraph.cli.main import app"),
        ("kvgraph.errors", "from kvgraph import Engine"),
        ("kvgraph.newcomer", ""),
    ],
)
def test_the_checker_sees_a_violation(module, source):
    assert len(violations({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvgraph.methods.full", "from kvgraph.methods.base import chain\nfrom ..plan import Plan\nfrom . import base"),
        ("kvgraph.engine.engine", "import torch\nfrom kvgraph import methods, models\nfrom .sampling import Sampler"),
        ("kvgraph.models", "from transformers.masking_utils import AttentionMaskInterface"),
        ("kvgraph.cli", "from kvgraph.engine.engine import Engine\nfrom kvgraph import __version__, corpus"),
        ("kvgraph", "from kvgraph.plan import Plan"),
    ],
)
def test_the_checker_lets_the_rest_pass(module, source):
    assert violations({module: source}) == []


def test_relative_imports_of_a_package_start_at_itself():
    assert imported("from .base import x\nfrom ..plan import y", "kvgraph.methods", True) == {
        "kvgraph.methods.base",
        "kvgraph.plan",
    }
