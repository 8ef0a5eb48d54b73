"""What a release is made of: one version, a changelog, a citation, and a package without what only the repository needs."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import yaml

import kvgraph

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_in_one_place():
    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kvgraph.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kvgraph.__version__


def test_the_changelog_has_the_version_with_the_date_of_the_citation():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.M)
    assert releases[0] == ("Unreleased", "") and all(date for _, date in releases[1:])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert dict(releases)[kvgraph.__version__] == str(citation["date-released"])
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


def test_the_package_has_no_training_logs():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    packed = [p for p in (ROOT / "kvgraph").rglob("*") if any(fnmatch(p.name, pattern) for pattern in patterns)]
    assert any(p.name == "model.safetensors" for p in packed)
    assert not [p for p in packed if p.name.endswith((".log.jsonl", ".config.json"))]
    assert len(list((ROOT / "runs" / "shipped").glob("*.log.jsonl"))) == 4


def test_everything_the_environment_needs_is_pinned():
    """constraints.txt names what the extras name."""
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = [*PROJECT["project"]["dependencies"], *sum(PROJECT["project"]["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=! ]", need)[0].lower().replace("_", "-") for need in wanted} - {"kvgraph"}
    assert names <= pinned, names - pinned
