"""Reading sources: every format, and input that is broken, binary, huge or meant to do harm."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zlib
from pathlib import Path

import pytest

from kvgraph.data import pages
from kvgraph.data.pages import base, html, markdown, pdf, plain, triples
from kvgraph.data.pages.base import PageElement, PageError, SourcePage


def read(folder: Path) -> tuple[dict[str, SourcePage], list[str]]:
    said: list[str] = []
    return {page.id: page for page in pages.read(folder, said.append)}, said


def kinds(elements: tuple[PageElement, ...]) -> list[tuple[str, str]]:
    return [(element.kind, element.text) for element in elements]


# formats


def test_markdown_has_headings_code_lists_tables_and_links():
    text = """---
title: The cape
---
# Lighthouse {#light}

See [the harbour](harbour.md#walls), <https://a.example/x>, [ref] and [[Other page|so]].

[ref]: ../far.md

## Built of
- basalt
  and sand
- iron

| a | b |
|---|---|
| 1 | 2 |

```python
# not a heading

x = 1
```

## Built of
"""
    page = markdown.read(text.encode(), "docs/cape.md", "cape.md", print)
    assert page.title == "The cape"
    assert [kind for kind, _ in kinds(page.elements)] == [
        *("heading", "paragraph", "heading", "item", "item", "row", "row", "code", "heading")
    ]
    links = page.elements[1].links
    assert set(links) == {"harbour.md#walls", "https://a.example/x", "../far.md", "wiki:Other page"}
    assert page.elements[0].anchors == ("light", "lighthouse") and page.elements[0].text == "Lighthouse"
    assert page.elements[-1].anchors == ("built-of-1",)
    assert page.elements[3].text == "- basalt\n  and sand"
    assert page.elements[7].text == "```python\n# not a heading\n\nx = 1\n```"


def test_html_keeps_the_main_part_with_its_structure():
    text = """<html><head><title>T</title><style>p {}</style></head><body><nav><a href="/all">all</a></nav>
<div role="main"><h1 id="top">os <i>paths</i><a class="headerlink" href="#top">¶</a></h1>
<p>One
 line, <a href="os.html#x">a link</a>.<br>Next.</p><script>var x</script>
<dl><dt id="os.join">os.join(a)</dt><dd><p>Joins.</p></dd></dl>
<ul><li>first</li><li><p>second</p></li></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td><p>2</p></td></tr></table>
<pre>x = 1
  y = 2</pre></div></body></html>"""
    page = html.read(text.encode(), "os.html", "os.html", print)
    assert page.title == "os paths"
    assert kinds(page.elements) == [
        ("heading", "os paths"),
        ("paragraph", "One line, a link.\nNext."),
        ("term", "os.join(a)"),
        ("paragraph", "Joins."),
        ("item", "- first"),
        ("item", "- second"),
        ("row", "a | b"),
        ("row", "1 | 2"),
        ("code", "```\nx = 1\n  y = 2\n```"),
    ]
    assert page.elements[1].links == ("os.html#x",)
    assert page.elements[2].anchors == ("os.join",) and page.elements[0].anchors == ("top",)


def test_text_has_paragraphs_and_underlined_headings():
    page = plain.read(
        b"Title\n=====\n\nOne.\nTwo.\n\n.. _part:\n\nPart\n----\nThree https://a.example/b.\n", "a.rst", "", print
    )
    assert kinds(page.elements)[0] == ("heading", "Title") and page.title == "Title"
    assert [(e.text, e.level) for e in page.elements if e.kind == "heading"] == [("Title", 1), ("Part", 2)]
    assert page.elements[-1].links == ("https://a.example/b.",)


def test_records_messages_and_triples_are_pages(tmp_path):
    rows = [{"id": 7, "title": "Seven", "text": "It is odd.", "links": [8]}, {"id": 8, "name": "Eight"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text("title,text\nNine,Odd too\n")
    (tmp_path / "c.tsv").write_text("Rome\tcapital_of\tItaly\nItaly\tpartOf\tEurope\nwrong line\n")
    (tmp_path / "d.nt").write_text(
        '<http://x/Paris> <http://x/in> <http://x/New_France> .\n<http://x/Paris> <http://x/n> "a \\"b\\""@fr .\n'
    )
    (tmp_path / "e.mbox").write_text(
        "From a@b Thu Jan  1 00:00:00 2026\nFrom: a@b\nSubject: Cape\nMessage-ID: <1@b>\n\nWhere is it?\n\n"
        "From c@b Thu Jan  1 00:00:00 2026\nFrom: c@b\nSubject: Re: Cape\nMessage-ID: <2@b>\nIn-Reply-To: <1@b>\n\nNorth.\n"
    )
    found, said = read(tmp_path)
    assert list(found) == ["7", "8", "b.csv:1", "entity:Italy", "entity:Rome", "entity:Paris", "mid:1@b", "mid:2@b"]
    assert found["7"].sources == ("8",) and found["7"].title == "Seven"
    assert found["8"].elements[0].text == "id: 8\nname: Eight"
    assert kinds(found["entity:Italy"].elements) == [("item", "Italy part of Europe.")]
    assert found["entity:Rome"].elements[0].links == ("entity:Italy",)
    assert kinds(found["entity:Paris"].elements) == [("item", "Paris in New France."), ("item", 'Paris n a "b".')]
    assert found["mid:2@b"].elements[0].links == ("mid:1@b",) and found["mid:2@b"].elements[-1].text == "North."
    assert said == [f"{tmp_path}/c.tsv: 1 lines are no triples and are left out, the first is line 3"]


def test_a_table_with_tabs_that_holds_no_triples_is_text(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\n1\t2\n")
    assert read(tmp_path)[0]["a.tsv"].elements[0].text == "a\tb\n1\t2"
    assert triples.read(tmp_path / "a.tsv", print) is None


def pdf_of(content: bytes, *more: bytes) -> bytes:
    """A PDF file of one page with this content, compressed."""
    packed = zlib.compress(content, 1)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        len(out),
    )


def test_a_pdf_is_read_by_its_pages():
    page = pdf.read(pdf_of(b"BT /F 12 Tf 20 200 Td (The cape lies north.) Tj ET"), "a/cape.pdf", "cape.pdf", print)
    assert kinds(page.elements) == [("paragraph", "The cape lies north.")]
    assert page.title == "cape" and page.elements[0].anchors == ("page=1",)


# broken and hostile input: one line each, and the rest is read


def test_what_cannot_be_read_is_said_and_the_rest_is_read(tmp_path):
    (tmp_path / "binary.dat").write_bytes(b"\x7fELF\0\0\1")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("cp1252"))
    (tmp_path / "utf16.txt").write_bytes("Größe".encode("utf-16"))
    (tmp_path / "declared.html").write_bytes('<meta charset="iso-8859-2"><p>Łódź</p>'.encode("iso-8859-2"))
    (tmp_path / "lines.jsonl").write_text('{"id": "one", "text": "1"}\n{broken\n{"id": "three", "text": "3"}\n')
    (tmp_path / "not.pdf").write_bytes(b"%PDF-1.4 nothing follows")
    (tmp_path / "torn.md.gz").write_bytes(gzip.compress(b"# Long" * 999)[:40])
    (tmp_path / "good.md").write_text("# Good")
    found, said = read(tmp_path)
    assert sorted(found) == ["declared.html", "good.md", "latin.txt", "one", "three", "utf16.txt"]
    assert {found[name].elements[0].text for name in ("latin.txt", "utf16.txt")} == {"Größe"}
    assert found["declared.html"].elements[0].text == "Łódź"
    told = "\n".join(said)
    assert len(said) == 6 and all("\n" not in line for line in said)
    for words in ("binary.dat is left out: it is not text", "empty.md is left out: it has no text",
                  "latin.txt is not UTF-8; it is read as Windows-1252", "lines.jsonl:2 is not JSON",
                  "not.pdf is left out", "torn.md.gz: "):  # fmt: skip
        assert words in told, told


def test_what_sphinx_makes_beside_its_pages_is_left_out(tmp_path):
    for name in ("index.html", "_static/x.js", "_sources/index.rst.txt", "sub/_images/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found, said = read(tmp_path)
    assert list(found) == ["index.html"] and len(said) == 1 and said[0].startswith("3 files in _downloads, _images")
    for name in ("searchindex.js", "genindex.html", "genindex-A.html", "sub/genindex.html"):
        (tmp_path / name).write_text("text")
    toctree = '<div class="toctree-wrapper compound"><ul><li><a href="a.html">Another page</a></li></ul></div>'
    (tmp_path / "index.html").write_text(f"<body><p>What is here.</p>{toctree}</body>")
    found, said = read(tmp_path)
    assert list(found) == ["index.html", "sub/genindex.html"] and said[1].startswith(
        "3 lists that Sphinx makes, such as genindex-A"
    )
    assert [element.text for element in found["index.html"].elements] == ["What is here."]


def test_pages_of_one_id_are_told_apart(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "1"}\n{"id": "x", "text": "2"}\n')
    found, said = read(tmp_path)
    assert [page.elements[0].text for page in found.values()] == ["1", "2"] and list(found) == ["x", "x-2"]
    assert "there is another page 'x'; this one is called 'x-2'" in said[0]


@pytest.mark.parametrize(
    ("ids", "called"),
    [
        ("a a a b b", "a a-2 a-3 b b-2"),
        ("a a a-2 a", "a a-2 a-2-2 a-3"),
        ("a-2 a a a", "a-2 a a-3 a-4"),
        ("a a a-2 a-2-2", "a a-2 a-2-2 a-2-2-2"),
    ],
)
def test_no_page_gets_the_id_of_another(tmp_path, ids, called):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{id}", "text": "x"}}\n' for id in ids.split()))
    assert [page.id for page in pages.read(tmp_path, lambda text: None)] == called.split()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(PageError, match="there is no file or folder"):
        list(pages.read(tmp_path / "none", print))


def test_pipes_and_links_that_lead_nowhere_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "good.md").write_text("# Good")
    found, said = read(tmp_path)
    assert list(found) == ["good.md"]
    assert [line.split("/")[-1] for line in said] == [
        f"{name} is left out: it is not an ordinary file" for name in ("gone.md", "pipe.md")
    ]


def test_a_file_beyond_the_limit_is_not_held_in_memory(tmp_path):
    with open(tmp_path / "huge.md", "wb") as file:  # 200 MB of nothing, which takes no room on the disk
        file.truncate(200 << 20)
    with gzip.open(tmp_path / "bomb.txt.gz", "wb", compresslevel=1) as packed:
        for _ in range(40):
            packed.write(b"word " * (1 << 18))
    (tmp_path / "good.md").write_text("# Good")
    tracemalloc.start()
    try:
        found, said = read(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(found) == ["good.md"]
    assert [line.split(" is left out: ")[1][:30] for line in said] == ["it has more than 32 MiB; split"] * 2
    assert peak < 4 * base.MOST_BYTES


def test_a_pdf_that_unpacks_to_much_more_ends_with_a_line(tmp_path):
    (tmp_path / "bomb.pdf").write_bytes(pdf_of(b"\0" * (80 << 20)))
    (tmp_path / "good.pdf").write_bytes(pdf_of(b"BT /F 12 Tf 20 200 Td (Good.) Tj ET"))
    found, said = read(tmp_path)
    assert list(found) == ["good.pdf"]
    assert any("bomb.pdf: can't read page 1" in line for line in said), said


def test_html_of_any_depth_and_with_any_number_of_links():
    deep = "<div>" * 20_000 + "<p>deep" + "</div>" * 10
    said: list[str] = []
    assert html.page(deep, "d.html", "d.html", said.append).elements[-1].text == "deep"
    assert said == ["d.html is nested too deep; it is read without its structure"]
    assert html.page("<div>" * 1500 + "<p>deep", "d.html", "d.html", said.append).elements[-1].text == "deep"
    many = "<p>" + "".join(f'<a href="p{i}.html">x</a> ' for i in range(100_000))
    page = html.page(many, "m.html", "", print)
    assert len(page.elements[0].links) == 100_000
    broken = "<table><tr><td>a<td>b<tr><td>c</table><p>text<b>bold<i></p>&#xD800;&nosuch;<3 <a href='x"
    assert [element.text for element in html.page(broken, "b.html", "", print).elements][:2] == ["a | b", "c"]


def test_markdown_of_any_depth():
    deep = markdown.elements("> " * 5000 + "deep\n\n" + "[" * 20_000 + "\n\n" + "* " * 2000 + "item")
    assert "deep" in deep[0].text and sum(len(element.text) for element in deep) > 20_000
