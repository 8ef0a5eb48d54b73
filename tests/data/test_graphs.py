"""Cutting pages, and builders of graphs: properties of every builder in the registry, and what each one finds."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgraph.data import graphs
from kvgraph.data.cut import TextChunk, cut, filled, slug
from kvgraph.data.graphs.base import Combined
from kvgraph.data.graphs.triples import along, paths
from kvgraph.data.pages import html, markdown, plain
from kvgraph.data.pages.base import PageElement, PageError, SourcePage
from kvgraph.data.pages.triples import Triple, pages
from kvgraph.data.table import ChunkTable
from kvgraph.errors import GraphError

ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")  # as the server takes them


def count(text: str) -> int:
    """Words and signs: a tokenizer by which texts together have as many tokens as one by one."""
    return len(re.findall(r"\w{1,6}|[^\w\s]", text))


def md(id: str, text: str, **more) -> SourcePage:
    return replace(markdown.read(text.encode(), id, id, print), **more)


def table(*pages: SourcePage, budget: int = 64) -> ChunkTable:
    return ChunkTable.of(pages, count, budget)


def named(table: ChunkTable, spec: str) -> set[tuple[str, str]]:
    """Edges as (source, reader), each chunk as the first line of its text."""
    head = [chunk.text.split("\n")[0] for chunk in table.chunks]
    return {(head[source], head[reader]) for source, reader in graphs.parse(spec).edges(table)}


# -- cutting ----------------------------------------------------------------------------------------------------------

texts = st.text(st.sampled_from("ab .\n-#|`[]()éç"), max_size=300)
elements = st.builds(
    lambda text, kind, level: PageElement(
        f"```\n{text}\n```" if kind == "code" else text, kind, level if kind == "heading" else 0, (f"a{level}",)
    ),
    st.text(st.sampled_from("abc de.\n"), min_size=1, max_size=400).filter(str.strip),
    st.sampled_from(["heading", "term", "paragraph", "code", "item", "row"]),
    st.integers(1, 4),
)
source_pages = st.builds(
    lambda number, title, found: SourcePage(f"p/{number}.md", title, tuple(found)),
    st.integers(0, 5),
    st.text(st.sampled_from("xy z"), min_size=1, max_size=200),
    st.lists(elements, min_size=1, max_size=12),
)


@given(source_pages, st.integers(32, 90))
def test_chunks_keep_the_budget_and_lose_nothing(page, budget):
    chunks = cut(page, count, budget)
    assert all(0 < chunk.tokens == count(filled(chunk.title, chunk.text)) <= budget for chunk in chunks)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.id for chunk in chunks}) == len(chunks) and all(ID.fullmatch(chunk.id) for chunk in chunks)
    letters = [
        re.sub(r"[\s`]", "", text) for text in ("".join(e.text for e in page.elements), "".join(c.text for c in chunks))
    ]
    assert letters[0] == letters[1]
    assert {a for c in chunks for a in c.anchors} == {a for e in page.elements for a in e.anchors}
    assert all(parent < chunk.number for chunk in chunks for parent in chunk.parents)


@given(source_pages)
def test_a_change_of_one_element_leaves_the_ids_of_other_sections(page):
    fixed = PageElement("End of it", "heading", 1)
    tail = [fixed, *(PageElement(f"word {i} " * 12) for i in range(3))]
    before = cut(replace(page, elements=(*page.elements, *tail)), count, 48)
    changed = (PageElement("more words " * 30), *page.elements, *tail)
    after = cut(replace(page, elements=changed), count, 48)
    assert before[-1].id == after[-1].id


def test_headings_stay_with_their_text_and_name_what_is_below():
    page = md(
        "a.md",
        "# Cape\n\n"
        + "North. " * 8
        + "\n\n## Light\n\n"
        + "It is lit. " * 12
        + "\n\n### Lamp\n\n"
        + "Oil burns. " * 14
        + "\n\n## Keeper\n\nAnna.",
    )
    first, light, lamp, *rest = cut(page, count, 64)
    assert first.text.startswith("Cape\n\nNorth.") and "Light" not in first.text
    assert light.text.startswith("Light\n\nIt is lit.") and light.title == "Cape" and light.parents == (0,)
    assert lamp.text.startswith("Lamp\n\nOil") and lamp.title == "Cape > Light" and lamp.parents == (1, 0)
    assert rest[-1].text.endswith("Keeper\n\nAnna.") and rest[-1].title == "Cape"
    assert all(not chunk.text.endswith(("Light", "Lamp", "Keeper")) for chunk in (first, light, lamp, *rest))


def test_rows_and_fences_are_cut_only_when_one_alone_is_too_long():
    rows = tuple(PageElement(f"row {i} | " + "cell " * 10, "row") for i in range(20))
    for chunk in cut(SourcePage("t", "T", rows), count, 64):
        assert all(re.fullmatch(r"row \d+ \| (cell ?){10}", line) for line in chunk.text.split("\n"))
    code = PageElement("```python\n" + "\n".join(f"x{i} = {i} + y" for i in range(40)) + "\n```", "code")
    parts = cut(SourcePage("c", "C", (PageElement("Before."), code)), count, 64)
    fenced = [chunk.text for chunk in parts if "x0" in chunk.text or "x39" in chunk.text]
    assert len(parts) > 3 and all(text.count("```") == 2 for text in fenced)
    assert all(
        re.fullmatch(r"x\d+ = \d+ \+ y", line) for chunk in parts for line in chunk.text.split("\n") if "=" in line
    )


def test_a_budget_that_is_too_small():
    with pytest.raises(PageError, match="at least 32 tokens, not 8"):
        cut(SourcePage("a", "A", (PageElement("x"),)), count, 8)


@pytest.mark.parametrize("name", ["a/b c.html", "../x", "ÄÖÜ", "", "-.:", "_a", "x" * 400, "entity:New York", "\0\n"])
def test_any_page_has_an_id_that_a_server_takes(name):
    assert ID.fullmatch(f"{slug(name)}.{'0' * 12}")


# -- every builder ----------------------------------------------------------------------------------------------------

LINKED = [
    md("a.md", "# Alpha\n\nSee [b](b.md#beta-part), [[Gamma]] and arXiv:2506.07334 [1].\n\n" + "word " * 50 + "\n\n[1] Alpha et al.", sources=("c.md",)),
    md("b.md", "# Beta\n\n" + "some words " * 40 + "\n\n## Beta part\n\nback to [a](a.md) \\cite{key} and Gamma."),
    md("c.md", "# Gamma\n\n@book{key, title}\n\n**Delta term** is here. [b](b.md)"),
    *pages([Triple("Rome", "in", "Italy"), Triple("Italy", "has", "Rome")], "x"),
    md("2506.07334.md", "# Paper\n\nText."),
]  # fmt: skip
SPECS = {"listed": 'listed:file="FILE"', "shape": "shape:of=chain"}


def spec_of(name: str, tmp_path) -> str:
    (tmp_path / "edges.tsv").write_text("a.md\tb.md\nnone\tb.md\nc.md\ta.md\n")
    return SPECS.get(name, name).replace("FILE", str(tmp_path / "edges.tsv"))


@pytest.mark.parametrize("name", graphs.BUILDERS)
def test_every_builder_keeps_its_caps_and_depends_on_the_pages_alone(name, tmp_path):
    spec = spec_of(name, tmp_path)
    made = table(*LINKED)
    edges = graphs.parse(spec).edges(made)
    assert edges, "it should find something here"
    shuffled = random.Random(0).sample(LINKED, len(LINKED))
    other = table(*shuffled)
    assert other.chunks == made.chunks and graphs.parse(spec).edges(other) == edges
    for k, tokens in ((1, 2048), (2, 60), (16, 1)):
        (builder,) = graphs.parse(spec).parts
        capped = replace(builder, k=k, tokens=tokens).edges(made)
        assert_sound(capped, made, k, tokens)
        assert set(capped) <= set(replace(builder, k=1000, tokens=10**6).edges(made))
    assert graphs.parse(graphs.format(graphs.parse(spec))) == graphs.parse(spec)


@given(st.lists(source_pages, max_size=6, unique_by=lambda page: page.id), st.integers(1, 5), st.randoms())
def test_no_pages_make_dangling_edges(found, k, order):
    made = table(*found)
    shuffled = list(found)
    order.shuffle(shuffled)
    for name in ("structure", "links", "citations", "mentions", "neighbours", "triples", "shape"):
        builder = replace(graphs.parse(name).parts[0], k=k)
        edges = builder.edges(made)
        assert_sound(edges, made, k, builder.tokens)
        assert builder.edges(table(*shuffled)) == edges


def assert_sound(edges, made: ChunkTable, k: int, tokens: int) -> None:
    read: dict[int, list[int]] = {}
    for source, reader in edges:
        assert 0 <= source < len(made) and 0 <= reader < len(made) and source != reader
        read.setdefault(reader, []).append(source)
    for sources in read.values():
        assert len(set(sources)) == len(sources) <= k
        assert sum(made.chunks[source].tokens for source in sources) <= tokens


def test_several_builders_are_joined_in_order_without_repeats():
    made = table(*LINKED)
    both = graphs.parse("links:k=2 + structure:before=0")
    assert isinstance(both, Combined) and both.k == 6 and both.tokens == 4096
    edges = both.edges(made)
    assert set(edges) == set(graphs.parse("links:k=2").edges(made)) | set(
        graphs.parse("structure:before=0").edges(made)
    )
    assert len(set(edges)) == len(edges)
    assert graphs.parse("none").edges(made) == () and graphs.format(graphs.parse("")) == "none"
    assert graphs.format(both) == "links:k=2+structure:before=0"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "no graph builder 'magic'; there are structure, links"),
        ("links+magic", r"no graph builder 'links\+magic'"),
        ("links:depth=2", "links has no field 'depth'; it has k, tokens, within"),
        ("links:k=0", "k must be an integer of at least 1"),
        ("links:within=2", "within must be true or false"),
        ("links:k", "isn't FIELD=VALUE"),
        ("listed", "listed needs a file"),
        ("shape:of=star", "edges 'star' aren't known"),
        ("shape:of=0>1", "must be the name of a shape"),
    ],
)
def test_wrong_builders_are_named(spec, message):
    with pytest.raises(GraphError, match=message):
        graphs.parse(spec)


# -- what each one finds ----------------------------------------------------------------------------------------------


def test_structure_reads_headings_the_beginning_and_what_is_before():
    page = md("a.md", "# Cape\n\n" + "North. " * 28 + "\n\n## Light\n\n" + "Lit. " * 25 + "\n\n" + "Lamp. " * 28)
    made = table(page)
    assert named(made, "structure") == {
        ("Cape", "Light"),
        ("Light", "Lamp. " * 27 + "Lamp."),
        ("Cape", "Lamp. " * 27 + "Lamp."),
    }
    assert named(made, "structure:headings=false,first=false,before=0") == set()


def test_links_lead_to_anchors_pages_titles_and_addresses():
    made = table(
        md("x/a.md", "[p](../b.md#part)\n[q](/b.md) [[Gamma ray]] [w](https://www.e.org/c/#top) [gone](none.md) [m](mailto:a@b)"),
        md("b.md", "# B\n\n" + "word " * 50 + "\n\n# Part\n\nHere."),
        md("c.md", "# Gamma ray"),
        md("d.md", "# D", url="http://e.org/c"),
    )  # fmt: skip
    heads = {chunk.text.split("\n")[0] for chunk in made.chunks}
    assert "Part" in heads
    assert {source for source, _ in named(made, "links")} == {"Part", "B", "Gamma ray", "D"}


def test_html_links_by_relative_path_and_links_within_a_page():
    a = html.page(
        '<h1 id="t">A</h1><p><a href="sub/b.html#x">b</a> <a href="#t">t</a> <a href="http://[bad">x</a>',
        "a.html",
        "",
        print,
    )
    b = html.page(f'<p>{"w " * 60}</p><p id="x">Here</p>', "sub/b.html", "", print)
    made = table(a, b, budget=48)
    ((source, reader),) = graphs.parse("links:within=false").edges(made)
    assert "Here" in made.chunks[source].text and made.chunks[reader].text.startswith("A") and source > 1


def test_a_page_of_a_hundred_thousand_links_and_a_circle_of_links():
    many = SourcePage("m", "M", (PageElement("x", links=tuple(f"p{i % 500}" for i in range(100_000))),))
    ring = [SourcePage(f"p{i}", f"P{i}", (PageElement(f"page {i}", links=(f"p{(i + 1) % 500}",)),)) for i in range(500)]
    made = table(many, *ring)
    edges = graphs.parse("links").edges(made)
    assert_sound(edges, made, 8, 2048)
    assert len(edges) == 500 + 8


def test_citations_by_key_number_range_arxiv_and_doi():
    made = table(
        md("paper.md", "As [2, 4-5] say, and \\citep[p. 3]{knuth84,none}, [@lamport; see @x], doi:10.1000/ab.c.\n\n" + "word " * 45
           + "\n\n[1] One.\n\n[2] Two, " + "t " * 40 + "\n\n[4] Four. " + "f " * 50 + "\n\n[5] Five." + "v " * 40),
        md("lib.bib.md", "@article{knuth84, title={T}}\n\n" + "filler " * 30 + "\n\n@misc{lamport, title={L}}"),
        md("work.md", "# W", url="https://doi.org/10.1000/AB.C"),
    )  # fmt: skip
    sources = {source[:8] for source, reader in named(made, "citations") if reader.startswith("As [2")}
    assert sources == {"[2] Two,", "[4] Four", "[5] Five", "@article", "@misc{la", "W"}
    code = md("code.md", "x[1] = y[2]")
    assert named(table(code, made and md("o.md", "# [1] no")), "citations") == set()


def test_mentions_lead_to_where_a_name_is_introduced():
    made = table(
        html.page('<dl><dt id="os.path.join">os.path.join(a)</dt><dd>Joins paths.</dd></dl>', "os.html", "", print),
        md("use.md", "# Usage\n\nCall os.path.join twice, in Basalt Cape."),
        md("cape.md", "# Basalt Cape\n\nA cape."),
        md("same1.md", "# Harbour"),
        md("same2.md", "# Harbour"),
        md("both.md", "# Both\n\nThe harbour."),
    )
    assert named(made, "mentions:share=1") == {("os.path.join(a)", "Usage"), ("Basalt Cape", "Usage")}


def test_neighbours_share_rare_words():
    made = table(
        md("a.md", "# Red fox\n\nruns far"), md("b.md", "# Blue sea\n\nof salt"), md("c.md", "# A fox\n\nin red fur")
    )
    assert named(made, "neighbours") == {("A fox", "Red fox"), ("Red fox", "A fox")}
    assert named(table(md("a.md", "# Alone")), "neighbours") == named(table(), "neighbours") == set()


def test_entities_read_what_they_are_related_to():
    facts = [Triple("Rome", "capitalOf", "Italy"), Triple("Italy", "in", "Europe"), Triple("Rome", "on", "Tiber")]
    assert named(table(*pages(facts, "x")), "triples") == {("Italy in Europe.", "Rome capital of Italy.")}


FACTS = [Triple(a, "to", b) for a, b in ("ab", "bc", "cd", "ax", "xd", "yz")]


def test_paths_between_entities_are_the_shortest():
    assert paths(FACTS, ["a", "d"]) == [(3, 4)]
    assert paths(FACTS, ["a", "c"]) == [(0, 1)]
    assert paths(FACTS, ["a", "d"], longest=1) == [(0,), (2,), (3,), (4,)]  # too far apart: what is around them
    assert paths(FACTS, ["a", "y"]) == [(0,), (3,), (5,)]
    assert paths(FACTS, ["nobody"]) == [] and paths([], ["a"]) == []
    assert along([(3, 4), (0, 1), (3, 4)]) == ((3, 4), (0, 1))
    with pytest.raises(GraphError, match="at least one triple"):
        paths(FACTS, ["a"], longest=0)


def test_listed_edges_name_pages_and_chunks(tmp_path):
    file = tmp_path / "e.tsv"
    made = table(md("a.md", "# A"), md("b.md", "# B"))
    b = made.chunks[1].id
    file.write_text(f"a.md\t{b}\n\nb.md\tnowhere\n")
    assert named(made, f'listed:file="{file}"') == {("A", "B")}
    file.write_text("one\n")
    with pytest.raises(GraphError, match="e.tsv:1 isn't a source and a reader"):
        graphs.parse(f'listed:file="{file}"').edges(made)


def test_shapes_hold_within_each_page():
    made = ChunkTable([TextChunk(f"{p}{i}", p, i, p, f"{p}{i}", tokens=1) for p in "ab" for i in range(3)])
    assert named(made, "shape:of=chain") == {("a0", "a1"), ("a1", "a2"), ("b0", "b1"), ("b1", "b2")}
    assert named(made, "shape:of=top-k:1") == {("a0", "a1"), ("a0", "a2"), ("b0", "b1"), ("b0", "b2")}


def test_plain_pages_have_a_graph_too():
    made = table(plain.read(b"One.\n\n" + b"Two. " * 40, "a.txt", "a.txt", print))
    assert graphs.parse("structure:first=false").edges(made) == ((0, 1), (1, 2))
