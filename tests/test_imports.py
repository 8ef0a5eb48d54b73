"""Imports go one way, from room to room and from file to file.

Read from the source, so imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvgraph"

# Modules and packages directly under kvgraph/. Each may import what is in a line above its own, and itself.
ORDER = (
    ("errors",),
    ("garbage", "places", "progress", "registry", "units"),
    ("graph",),
    ("edges",),
    ("plan",),
    ("explain",),
    ("methods",),
    ("data",),
    ("memo",),
    ("store",),
    ("attention",),
    ("models",),
    ("checks",),
    ("engine",),
    ("demo",),
    ("__init__",),
    ("encoding",),
    ("train", "eval", "indexing"),
    ("server",),
    ("cluster",),
    ("integrations",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Libraries that only these may import; whatever else imports them would drag a model library into text-only work.
PURE = {
    "errors",
    "garbage",
    "memo",
    "places",
    "progress",
    "registry",
    "units",
    "graph",
    "edges",
    "plan",
    "explain",
    "methods",
    "data",
    "__init__",
}
ONLY_IN = {"transformers": {"models"}, "torch": set(LEVEL) - PURE}

Sources = dict[str, str]  # dotted name of a module -> its source


def room(module: str) -> str:
    """The module or package directly under kvgraph/ that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full dotted names of everything a module's source imports, relative imports resolved.

    For `from a import b` both a and a.b are named: b may be a module.
    """
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
            full = {f"{base}.{alias.name}" for alias in node.names}
            if base == "kvgraph":  # `from kvgraph import plan` names a module, `from kvgraph import Engine` the package
                names |= {name if room(name) in LEVEL else base for name in full}
            else:
                names |= {base, *full}
    return names


def violations(sources: Sources, packages: frozenset[str] = frozenset()) -> list[str]:
    """What breaks the order in {module: source}; `packages` are the modules that are an __init__.py."""
    found = []
    for module, source in sources.items():
        here = room(module)
        if here not in LEVEL:
            found.append(f"{module}: {here!r} has no place in ORDER; give it one")
            continue
        wrong = set()
        for name in sorted(imported(source, module, module in packages)):
            top = name.split(".")[0]
            if top == "kvgraph":
                there = room(name)
                if there != here and LEVEL.get(there, len(ORDER)) >= LEVEL[here]:
                    wrong.add(f"{module} imports {there}, which stands beside or below {here}")
            elif here not in ONLY_IN.get(top, {here}):
                wrong.add(f"{module} imports {top}, which only {sorted(ONLY_IN[top])} may")
        found += sorted(wrong)
    return found


def circle(sources: Sources, packages: frozenset[str] = frozenset()) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; empty where there is none."""
    graph = {
        module: {
            name
            for name in imported(source, module, module in packages)
            if name in sources
            and name != module
            and not module.startswith(f"{name}.")  # a file imports its own package in any case
        }
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def package() -> tuple[Sources, frozenset[str]]:
    """The sources of kvgraph, and which of its modules are an __init__.py."""
    sources, packages = {}, set()
    for path in PACKAGE.rglob("*.py"):
        parts = ("kvgraph", *path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    assert {"kvgraph", "kvgraph.plan", "kvgraph.engine.engine"} <= set(sources)
    return sources, frozenset(packages)


def test_the_package_keeps_the_order():
    assert violations(*package()) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(*package()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvgraph.plan", "import torch"),
        ("kvgraph.methods.full", "from torch import Tensor"),
        ("kvgraph.data.items", "from torch import Tensor"),
        ("kvgraph.graph", "def f():\n    import transformers"),
        ("kvgraph.explain", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch.nn"),
        ("kvgraph.engine.engine", "from transformers import AutoModel"),
        ("kvgraph.store.disk.store", "import transformers.utils"),
        ("kvgraph.graph", "from kvgraph.plan import Plan"),
        ("kvgraph.graph", "from kvgraph.edges import chain"),
        ("kvgraph.plan", "from kvgraph import methods"),
        ("kvgraph.plan", "from .methods import get"),
        ("kvgraph.methods.full", "from ..engine import engine"),
        ("kvgraph.attention.rope", "import kvgraph.models"),
        ("kvgraph.attention.step", "from kvgraph.engine.scheduler import Scheduler"),
        ("kvgraph.store.memory", "from kvgraph.attention.rope import Rotary"),
        ("kvgraph.checks.gate", "from kvgraph.engine.engine import Engine"),
        ("kvgraph.engine.engine", "from kvgraph.cli import main"),
        ("kvgraph.engine.engine", "def f():\n    from kvgraph.server import app"),
        ("kvgraph.data.items", "from kvgraph.eval.metrics import METRICS"),
        ("kvgraph.train.trainer", "from kvgraph.eval.run import evaluate"),
        ("kvgraph.eval.run", "from kvgraph.train import recipes"),
        ("kvgraph.data.corpus", "from kvgraph.train.records import Records"),
        ("kvgraph.data.prompt", "from kvgraph import models"),
        ("kvgraph.data.chat", "from transformers import AutoTokenizer"),
        ("kvgraph.train.prepare.tokens", "def f():\n    from transformers import AutoTokenizer"),
        ("kvgraph.memo", "from kvgraph.store.disk import DiskStore"),
        ("kvgraph.server.app", "from kvgraph.cli.main import app"),
        ("kvgraph.server.app", "from kvgraph.cluster.routing import SpanRouter"),
        ("kvgraph.cluster.routing", "from kvgraph.cli import main"),
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
        ("kvgraph.models.adapter", "from transformers.masking_utils import AttentionMaskInterface"),
        ("kvgraph.cli", "from kvgraph.engine.engine import Engine\nfrom kvgraph import __version__, data"),
        ("kvgraph", "from kvgraph.plan import Plan"),
    ],
)
def test_the_checker_lets_the_rest_pass(module, source):
    assert violations({module: source}) == []


def test_the_checker_sees_a_circle():
    sources = {
        "kvgraph.store.a": "from kvgraph.store import b",
        "kvgraph.store.b": "def f():\n    from kvgraph.store.c import x",
        "kvgraph.store.c": "import kvgraph.store.a",
    }
    assert set(circle(sources)) == set(sources)
    del sources["kvgraph.store.c"]
    assert circle(sources) == []


def test_relative_imports_of_a_package_start_at_itself():
    assert imported("from .base import x\nfrom ..plan import y", "kvgraph.methods", True) == {
        "kvgraph.methods.base",
        "kvgraph.methods.base.x",
        "kvgraph.plan",
        "kvgraph.plan.y",
    }
