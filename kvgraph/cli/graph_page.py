"""An index's graph as one HTML page that needs no server: the playground's drawing, around one page at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

DRAWN = 40  # chunks at once; more can't be told apart
PLAYGROUND = "kvgraph.server"


def page(description: Mapping[str, Any]) -> str:
    """The page of an index's file (`kvgraph.indexing.described`)."""
    data = {
        "name": description["name"],
        "chunks": [
            {key: chunk[key] for key in ("page", "number", "title", "tokens", "sources")}
            for chunk in description["chunks"]
        ],
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        TEMPLATE.replace("{{style}}", _file("style.css"))
        .replace("{{title}}", str(description["name"]))
        .replace("{{script}}", "\n".join((_file("dom.js"), _file("graph.js"), SCRIPT)))
        .replace("{{drawn}}", str(DRAWN))
        .replace("{{data}}", text)
    )


def _file(name: str) -> str:
    """A file of the playground; of a script, what stands by itself."""
    text = files(PLAYGROUND).joinpath("playground", name).read_text(encoding="utf-8")
    text = re.sub(r"^import .*?;\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^export ", "", text, flags=re.MULTILINE)


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} · kvgraph</title>
<style>
{{style}}
body { display: block; margin: 1rem auto; max-width: 75rem; padding: 0 1rem; }
#drawing { width: 100%; min-height: 20rem; }
select { max-width: 100%; }
</style>
</head>
<body>
<h1>{{title}}</h1>
<p><label>Page <select id="page"></select></label> <span id="count"></span></p>
<p id="said" role="status"></p>
<div id="drawing"><svg id="svg" role="group" aria-label="Chunks of the page, what they read, and what reads them"></svg></div>
<script type="application/json" id="data">{{data}}</script>
<script type="module">
const DRAWN = {{drawn}};
{{script}}
</script>
</body>
</html>
"""

SCRIPT = """
const { chunks } = JSON.parse(document.getElementById("data").textContent);
const pages = Map.groupBy ? Map.groupBy(chunks.keys(), (i) => chunks[i].page) : new Map();
if (!Map.groupBy) chunks.forEach((chunk, i) => pages.set(chunk.page, [...(pages.get(chunk.page) ?? []), i]));
const select = document.getElementById("page"), said = document.getElementById("said");
const readers = chunks.map(() => []);
chunks.forEach((chunk, i) => chunk.sources.forEach((source) => readers[source].push(i)));
const degree = (places) => places.reduce((sum, i) => sum + chunks[i].sources.length + readers[i].length, 0);
select.append(...[...pages].sort((a, b) => degree(b[1]) - degree(a[1])).map(([page, places]) =>
  new Option(`${chunks[places[0]].title.split(" > ")[0]} — ${page} (${places.length})`, page)));
const told = (i) => `${chunks[i].title}, part ${chunks[i].number + 1} of ${chunks[i].page}: ${chunks[i].tokens} tokens, `
  + `reads ${chunks[i].sources.length}, read by ${readers[i].length}`;
const drawing = new Drawing(document.getElementById("svg"), {
  connect() {}, disconnect() {},
  inspect: (id) => { said.textContent = told(Number(id)); },
  say() {},
});
function show() {
  const own = pages.get(select.value), near = new Set(own.slice(0, DRAWN));
  for (const i of own) for (const j of [...chunks[i].sources, ...readers[i]]) if (near.size < DRAWN) near.add(j);
  const nodes = [...near].map((i) => ({
    id: String(i), kind: "document", title: `${chunks[i].title.split(" > ").at(-1)} ${chunks[i].number + 1}`,
    states: [{ label: "", tiers: [] }], description: told(i),
  }));
  const edges = [...near].flatMap((i) => chunks[i].sources.filter((source) => near.has(source)).map((source) =>
    ({ source: String(source), reader: String(i), editable: false, live: true })));
  drawing.show(nodes, edges);
  document.getElementById("count").textContent = `${near.size} chunks and ${edges.length} edges drawn`;
  said.textContent = "";
}
select.addEventListener("change", show);
show();
"""
