"""What another package adds is used like kvgraph's own, and what is wrong with it is named."""

from __future__ import annotations

import os
import sys

import pytest

import toys
from commands import Command
from kvgraph import demo, methods
from kvgraph.errors import GraphError, KVGraphError
from kvgraph.methods.registry import METHODS, _wrong
from kvgraph.registry import Registry


def test_an_installed_method_runs_everywhere(tmp_path):
    """In a process of its own, where the package is on the path as if it were installed."""
    package, model = tmp_path / "package", tmp_path / "model"
    package.mkdir()
    model.mkdir()
    toys.write(package)
    demo.write_model(model)
    done = Command(model, module="toys", PYTHONPATH=os.pathsep.join([str(package), *sys.path]))
    assert done.wait(300) == 0 and done.stdout.endswith("used everywhere\n"), done.stdout + done.stderr
    assert "mirror" in done.stdout and "Mirror with ten free positions" in done.stdout
    with pytest.raises(GraphError, match="no method 'mirror'"):
        methods.get("mirror")


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """The methods there are when a package declares this."""

    def declared(entry_points: str, module: str = toys.MODULE) -> Registry:
        toys.write(tmp_path, module, f"[kvgraph.methods]\n{entry_points}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "mirror", raising=False)
        return Registry({"full": methods.Full}, METHODS.group, _wrong)

    yield declared
    sys.modules.pop("mirror", None)


def test_a_package_is_imported_when_it_is_asked_for(declared):
    found = declared("mirror = mirror:Mirror")
    assert list(found) == ["full", "mirror"] and len(found) == 2 and "mirror" in found and "other" not in found
    assert "mirror" not in sys.modules
    assert found["mirror"]().name == "mirror" and found["mirror"] is found["mirror"] and "mirror" in sys.modules
    with pytest.raises(KeyError):
        found["other"]
    with pytest.raises(TypeError):
        found["mine"] = methods.Full  # type: ignore[index]


@pytest.mark.parametrize(
    ("entry", "module", "message"),
    [
        ("mirror = mirror:Mirror", "1 / 0", "ZeroDivisionError: division by zero"),
        ("mirror = mirror:Missing", toys.MODULE, "AttributeError"),
        ("mirror = mirror:ring", toys.MODULE, "TypeError"),
        ("mirror = mirror:dataclass", toys.MODULE, "it doesn't make a kvgraph.methods.Method"),
        ("glass = mirror:Mirror", toys.MODULE, "the method's name is 'mirror'"),
        ("mirror = nowhere:Mirror", toys.MODULE, "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_package_that_is_wrong_is_named(declared, entry, module, message):
    found = declared(entry, module)
    with pytest.raises(KVGraphError) as refused:
        found[entry.split()[0]]
    assert message in str(refused.value) and "of the package mirror, which declares" in str(refused.value)
    assert found["full"] is methods.Full


def test_kvgraphs_own_names_stay_its_own(declared):
    found = declared("full = mirror:Mirror")
    with pytest.warns(UserWarning, match="mirror:Mirror of the package mirror is left out: kvgraph has its own 'full'"):
        assert list(found) == ["full"]
    assert found["full"] is methods.Full
