"""The references that the site generates: every command, option, route and room is there, and pages that miss one fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kvgraph import methods

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "generate"))  # as mkdocs does for its hooks

import command_line  # noqa: E402
import http_api  # noqa: E402
import python_api  # noqa: E402

CLI = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
HTTP = (DOCS / "reference" / "http.md").read_text(encoding="utf-8")


def sections(markdown: str) -> dict[str, str]:
    """The sections of the command line's page by command."""
    parts = re.split(r"^## kvgraph ([a-z ]+)$", markdown, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(command) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")} - {"--help"}


def test_every_command_has_a_section_with_its_options_and_no_others():
    there, found = command_line.commands(), sections(command_line.fill(CLI))
    assert list(sections(CLI)) == command_line.MARK.findall(CLI)  # each comment stands in the section of its command
    assert set(found) == set(there)
    for name, command in there.items():
        assert set(re.findall(r"^\| `(--[a-z-]+)", found[name], re.M)) == options(command), name
        assert set(re.findall(FLAG, sections(CLI)[name])) <= options(command), name  # what the text around it names
        assert f"```text\nkvgraph {name} [OPTIONS]" in found[name]
        assert re.search(rf"^ *kvgraph {name}", found[name].split("```sh\n")[1], re.M), f"{name} has no example"


def test_a_page_that_misses_or_invents_a_command_fails():
    with pytest.raises(ValueError, match="cli.md describes"):
        command_line.fill(CLI.replace("<!-- kvgraph ask -->", ""))
    with pytest.raises(ValueError, match="cli.md describes"):
        command_line.fill(CLI + "\n<!-- kvgraph fly -->\n")


def test_every_preset_is_listed_as_it_is():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|", CLI.split("### Presets")[1].split("\n## ")[0], re.M))
    assert list(rows) == list(methods.PRESETS)
    rows["graph-kv-rag-top-k"] = rows["graph-kv-rag"]  # "the same"
    for name, spec in rows.items():
        assert methods.parse(spec.strip("`")) == methods.get(name), name


def test_every_method_is_explained():
    text = (DOCS / "explanation" / "methods.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in methods.METHODS:
        assert f"\n| `{name}` |" in text and f"\n| `{name}` |" in readme, name


def test_every_route_and_object_is_listed_and_every_link_has_its_place():
    page = http_api.fill(HTTP)
    document = http_api.create_app(http_api.Settings(model="m")).openapi()
    headings = re.findall(r"^### (.+)$", page, re.M)
    routes = [f"`{method.upper()} {path}`" for path, found in document["paths"].items() for method in found]
    assert headings == routes + sorted(document["components"]["schemas"])
    anchors = {heading.lower() for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors
    for name, schema in document["components"]["schemas"].items():
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == set(schema.get("properties", {})), name


def test_a_page_without_its_comments_fails():
    with pytest.raises(ValueError, match="lacks the comment <!-- objects -->"):
        http_api.fill(HTTP.replace("<!-- objects -->", ""))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer"),
        ({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}, "list of integer or string"),
        ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, "[integer, string]"),
        ({"enum": ["stop", "length", None]}, '`"stop"` or `"length"`'),
        ({"const": True}, "`true`"),
        ({"$ref": "#/components/schemas/SpanOut"}, "[SpanOut](#spanout)"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "object of integer"),
        ({}, "any JSON"),
    ],
)
def test_types_in_words(schema, words):
    assert http_api._type(schema) == words


def test_the_python_reference_has_every_public_module():
    described = set(re.findall(r"^::: (\S+)$", "\n".join(page.text for page in python_api.pages()), re.M))
    expected = set()
    for path in (ROOT / "kvgraph").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if len(parts) > 1 and parts[1] not in python_api.ELSEWHERE and not any(p.startswith("_") for p in parts):
            expected.add(".".join(parts))
    assert described == expected


def test_the_python_reference_begins_with_the_public_names():
    first = python_api.pages()[0].text
    import kvgraph

    listed = re.findall(r"^\| \[`(\w+)`\]", first, re.M)
    assert listed == sorted(set(kvgraph.__all__) - {"__version__"})


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]
)
def test_links_of_files_outside_the_site_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target
