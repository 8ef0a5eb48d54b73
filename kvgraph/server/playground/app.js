// The page's state, and the wiring between its parts.

import { call, session } from "./api.js";
import { DocumentList, label, makeDocument, split } from "./documents.js";
import { $, duration, h, number } from "./dom.js";
import { Drawing } from "./graph.js";
import { Column } from "./run.js";

const PREFIX = "prefix", QUESTION = "question"; // nodes of the drawing that aren't documents
const WAIT = 250; // ms without an edit before a plan is asked for

const state = {
  documents: [],
  edges: [], // {source, reader}: documents
  model: null, // its card
  columns: [],
  running: null, // an AbortController
  runs: 0,
  inspected: null, // the node that the details are of
};

const list = new DocumentList({ changed: edited, remove });
const drawing = new Drawing($("drawing"), {
  connect: (source, reader) => addEdge(byKey(source), byKey(reader)),
  disconnect: (edge) => removeEdge(state.edges.find((e) => key(e.source) === edge.source && key(e.reader) === edge.reader)),
  inspect,
  say,
});

// -- documents -------------------------------------------------------------------------------------------------------------

const key = (doc) => String(doc.key);
const byKey = (id) => state.documents.find((doc) => key(doc) === id);
const title = (doc) => label(doc, state.documents.indexOf(doc));

function addDocuments(documents) {
  state.documents.push(...documents);
  redraw();
}

function remove(doc) {
  const index = state.documents.indexOf(doc);
  state.documents.splice(index, 1);
  state.edges = state.edges.filter((edge) => edge.source !== doc && edge.reader !== doc);
  redraw();
  const neighbour = state.documents[index] ?? state.documents.at(-1);
  if (neighbour) list.focus(neighbour);
  else $("add").focus();
}

function loadDemo() {
  state.documents = state.data.documents.map(({ title, text }) => makeDocument(title, text));
  state.edges = state.data.edges.map(([s, r]) => ({ source: state.documents[s], reader: state.documents[r] }));
  drawing.moved.clear();
  $("examples").replaceChildren(...state.data.questions.map((question) => h("option", {}, question)));
  $("examples-label").hidden = false;
  $("question").value = state.data.questions[0];
  redraw();
}

async function pickStored() {
  const note = $("stored-note");
  $("stored-list").replaceChildren();
  note.textContent = "…";
  $("stored-dialog").showModal();
  try {
    const { data } = await call("v1/segments?limit=1000");
    note.textContent = data.length ? "" : "There are none yet. PUT /v1/segments stores some.";
    $("stored-list").replaceChildren(...data.map((segment) => h("label", { class: "choice" },
      h("input", { type: "checkbox", value: segment.id, "data-title": segment.title ?? "" }),
      h("span", {}, segment.title || segment.id), h("span", { class: "quiet" }, `${number(segment.tokens)} tok`))));
  } catch (error) {
    note.textContent = error.status === 404 ? "This server stores no segments." : error.message;
  }
}

// -- edges -----------------------------------------------------------------------------------------------------------------

function addEdge(source, reader) {
  if (state.edges.some((edge) => edge.source === source && edge.reader === reader)) {
    return say(`“${title(reader)}” reads “${title(source)}” already.`);
  }
  state.edges.push({ source, reader });
  say(`“${title(reader)}” now reads “${title(source)}”.`);
  redraw();
}

function removeEdge(edge) {
  state.edges = state.edges.filter((e) => e !== edge);
  say(`“${title(edge.reader)}” no longer reads “${title(edge.source)}”.`);
  redraw();
}

/** Let the server resolve a rule such as top-k:3, so that the page has no rules of its own. */
async function buildEdges(shape, value) {
  if (!state.model) return say("The model isn't ready yet.");
  const rule = value === null ? shape : `${shape}:${value}`;
  if (shape === "none") state.edges = [];
  else {
    try {
      const { edges } = await call("v1/plan", request({ kvgraph: { method: "graph-kv", edges: rule } }));
      state.edges = edges.map(([s, r]) => ({ source: state.documents[s], reader: state.documents[r] }));
    } catch (error) {
      return say(error.message);
    }
  }
  drawing.moved.clear();
  say(`${state.edges.length} edges.`);
  redraw();
}

function drawEdgeList() {
  $("edge-count").textContent = state.edges.length || "";
  for (const id of ["edge-source", "edge-reader"]) {
    const chosen = $(id).value;
    $(id).replaceChildren(...state.documents.map((doc) => h("option", { value: key(doc) }, title(doc))));
    if (byKey(chosen)) $(id).value = chosen;
  }
  $("edge-list").replaceChildren(...state.edges.map((edge) => h("li", {},
    h("span", { class: "name", title: title(edge.source) }, title(edge.source)), "→",
    h("span", { class: "name", title: title(edge.reader) }, title(edge.reader)),
    h("button", {
      type: "button", class: "plain cross", "aria-label": `Remove the edge ${title(edge.source)} to ${title(edge.reader)}`,
      click: () => { removeEdge(edge); $("edge-source").focus(); },
    }, "×"))));
}

// -- requests --------------------------------------------------------------------------------------------------------------

const chats = () => state.model.kvgraph.chat;

/** A request's body: a chat, or for models without a chat template a completion. */
function request({ kvgraph, question = $("question").value.trim() || "?", ...more }) {
  const system = $("system").value;
  const documents = state.documents.map((doc) => (doc.segment ? { segment: doc.segment } : { title: doc.title || null, text: doc.text }));
  const common = { model: state.model.id, documents, ...more };
  if (!chats()) return { ...common, prompt: question, kvgraph: { ...kvgraph, prefix: system } };
  const messages = [{ role: "user", content: question }];
  if (system) messages.unshift({ role: "system", content: system });
  return { ...common, messages, kvgraph };
}

function options(column) {
  const edges = state.edges.map(({ source, reader }) => [state.documents.indexOf(source), state.documents.indexOf(reader)]);
  return { ...column.options(), ...(column.method.reads_edges && edges.length ? { edges } : {}) };
}

function sampling() {
  const given = { max_tokens: $("max-tokens"), temperature: $("temperature"), seed: $("seed") };
  return Object.fromEntries(Object.entries(given).filter(([, input]) => input.value !== "").map(([name, input]) => [name, Number(input.value)]));
}

async function ask() {
  const question = $("question").value.trim();
  if (state.running || !state.model) return;
  if (!question) {
    say("Type a question first.");
    return $("question").focus();
  }
  state.running = new AbortController();
  drawBusy();
  const { signal } = state.running;
  const path = chats() ? "v1/chat/completions" : "v1/completions";
  const one = (column) => column.run(path, request({
    question, kvgraph: options(column), stream: true, stream_options: { include_usage: true }, ...sampling(),
  }), signal).then((run) => { if (run) finished(run, question); });
  state.columns.forEach((column) => column.clear());
  try {
    if ($("order").value === "turn") {
      for (const column of state.columns) if (!signal.aborted) await one(column);
    } else {
      await Promise.all(state.columns.map(one));
    }
  } finally {
    state.running = null;
    drawBusy();
  }
  await plan();
}

function finished(run, question) {
  const extents = state.columns.map((column) => column.extent());
  const most = (name) => Math.max(...extents.map((extent) => extent[name])) || 1;
  state.columns.forEach((column) => column.bars({ tokens: most("tokens"), seconds: most("seconds") }));
  $("history").hidden = false;
  const { cost } = run;
  const share = run.reused / (run.reused + cost.document_tokens_computed) || 0;
  const cache = share === 1 ? "warm" : share < 0.05 ? "cold" : `${Math.floor(100 * share)} %`;
  const cells = [++state.runs, run.label, question, state.documents.length, cache];
  const figures = [
    duration(cost.ttft), duration(run.seen), number(cost.computed_tokens), number(run.reused), number(run.answer),
    run.perToken === null ? "–" : duration(run.perToken),
  ];
  $("runs").prepend(h("tr", { "data-letter": run.letter, "data-cache": cache },
    ...cells.map((cell, i) => h("td", { class: i === 2 ? "long" : i === 4 ? "cache" : "" }, String(cell))),
    ...figures.map((cell) => h("td", { class: "n" }, cell))));
}

function drawBusy() {
  $("send").disabled = Boolean(state.running || !state.model);
  $("stop").disabled = !state.running;
}

// -- plans and the drawing -------------------------------------------------------------------------------------------------

let timer = null;

/** After an edit: what stays of the drawing now, plans as soon as nobody types. */
function edited() {
  state.columns.forEach((column) => column.tell("run", null));
  drawEdgeList();
  draw();
  clearTimeout(timer);
  timer = setTimeout(plan, WAIT);
}

function redraw() {
  list.draw(state.documents);
  edited();
}

async function plan() {
  if (!state.model) return;
  await Promise.all(state.columns.map((column) => column.look(request({ kvgraph: options(column), ...sampling() }))));
  for (const column of state.columns) column.note.textContent = remark(column);
  const counts = state.documents.map((doc, i) => [doc.key, state.columns.map((column) => column.versions(i)[0]?.tokens).find(Boolean)]);
  list.measure(new Map(counts.filter(([, tokens]) => tokens)));
  draw();
}

function remark(column) {
  const told = [];
  if (state.edges.length && !column.method.reads_edges) told.push(`${column.method.name} reads no edges; they are left out.`);
  if (column.method.name !== "full" && !state.model.kvgraph.tuned_for.includes(column.method.name)) {
    told.push("The model isn't tuned for it; answers may be worse.");
  }
  if (column.plan?.dropped.length) told.push(`Left out to make the rest fit: ${column.plan.dropped.length} of ${state.documents.length} documents.`);
  return told.join(" ");
}

function draw() {
  const shown = document.querySelector("#shown input:checked").value;
  const column = state.columns.find((c) => c.letter === shown && c.plan);
  const nodes = state.documents.map((doc, i) => ({
    id: key(doc), title: title(doc), kind: "document", description: described(doc, i),
    states: state.columns.map((c) => ({ label: c.letter, tiers: c.versions(i).map((span) => span.tier) })),
  }));
  if (column?.plan.spans.some((span) => span.cached && span.segment === null)) {
    nodes.push({ id: PREFIX, title: "Prefix", kind: "special", description: "What stands before the documents" });
  }
  if (column) nodes.push({ id: QUESTION, title: "Question", kind: "special", description: "The question" });
  const drawn = state.edges.map((edge) => ({
    source: key(edge.source), reader: key(edge.reader), editable: true, title: `${title(edge.source)} → ${title(edge.reader)}: click to remove`,
  }));
  $("empty").hidden = state.documents.length > 0;
  drawing.show(nodes, column ? reads(column.plan) : drawn, drawn);
  inspect(state.inspected);
}

/** Which node a span of a plan belongs to. */
function owner(span) {
  if (span.segment !== null && state.documents[span.segment]) return key(state.documents[span.segment]);
  return span.cached ? PREFIX : QUESTION;
}

/** Who reads whom in a plan, between documents, prefix and question. */
function reads(plan) {
  const found = new Map();
  for (const span of plan.spans) {
    for (const view of span.sees) {
      const source = owner(plan.spans[view.span]), reader = owner(span);
      if (source !== reader || span.segment !== null) found.set(`${source} ${reader}`, { source, reader, live: reader === QUESTION });
    }
  }
  return [...found.values()];
}

const WHERE = { memory: "in memory", disk: "on disk" };
const where = (span) => (span.tier ? WHERE[span.tier] ?? `in ${span.tier}` : "to compute");

function described(doc, index) {
  const told = state.columns.map((column) => {
    const versions = column.versions(index).map((span) => `version ${span.round} ${where(span)}`);
    return `${column.letter}, ${column.method.name}: ${versions.join(", ") || "not read"}`;
  });
  return `${title(doc)}. ${told.join(". ")}. Choose it as the source of an edge, then its reader.`;
}

/** What the plans say of one node, beside the drawing; it stays there until another is looked at. */
function inspect(id) {
  state.inspected = id;
  const doc = byKey(id);
  if (!doc && id !== PREFIX && id !== QUESTION) return $("details").replaceChildren();
  const name = doc ? title(doc) : id === PREFIX ? "Prefix" : "Question";
  const parts = state.columns.filter((column) => column.plan).map((column) => {
    const { spans } = column.plan;
    const lines = spans.filter((span) => owner(span) === id).map((span) => {
      const sources = [...new Set(span.sees.map((view) => spans[view.span].segment).filter((s) => state.documents[s]))]; // the plan may be older than the list
      const told = sources.length > 4 ? `${sources.length} documents` : sources.map((i) => label(state.documents[i], i)).join(", ");
      return h("li", {},
        h("b", {}, doc ? `version ${span.round}` : `${number(span.tokens)} tokens`),
        ` at ${span.positions.map(([a, b]) => `${a}–${b}`).slice(0, 3).join(", ")}, ${span.cached ? where(span) : "computed each time"}`,
        told ? `; reads ${told}` : "");
    });
    return h("div", {}, h("h4", {}, `${column.letter} · ${column.method.name}`), h("ul", {}, ...(lines.length ? lines : [h("li", {}, "not read")])));
  });
  $("details").replaceChildren(h("h3", {}, name), ...parts);
}

function say(text) {
  $("hint").textContent = text || "Click a source, then its reader, to add an edge; click an arrow to remove it.";
}

// -- the page --------------------------------------------------------------------------------------------------------------

/** Find out what is served; again every second while the model is being loaded. */
async function connect() {
  state.model = null;
  drawBusy();
  try {
    [state.model] = (await call("v1/models")).data;
  } catch (error) {
    $("model").textContent = error.status === 401 ? "this server wants an API key" : error.status === 503 ? "the model is being loaded…" : error.message;
    if (error.status === 401) $("key").focus();
    else setTimeout(connect, 1000);
    return;
  }
  const { id, max_model_len: limit, kvgraph } = state.model;
  $("model").textContent = `${id} · ${number(limit)} positions · default ${kvgraph.default_method}`;
  $("system-label").textContent = kvgraph.chat ? "System prompt" : "Text before the documents (the model has no chat template)";
  if (!state.columns.length) {
    const second = kvgraph.default_method === "full" ? "graph-kv" : kvgraph.default_method;
    state.columns = [["A", "full"], ["B", second]].map(([letter, method]) => (
      new Column(letter, $(`column-${letter}`), state.data.methods, method, { changed: edited })));
  }
  drawBusy();
  edited();
}

function theme(choice) {
  const dark = choice ? choice === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (choice) document.documentElement.dataset.theme = choice;
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
  return dark;
}

function wire() {
  const on = (id, event, act) => $(id).addEventListener(event, act);
  const submit = (id, act) => on(id, "submit", (event) => { event.preventDefault(); act(); });

  on("demo", "click", loadDemo);
  on("add", "click", () => {
    const doc = makeDocument();
    doc.open = true;
    addDocuments([doc]);
    list.focus(doc);
  });
  on("clear", "click", () => { state.documents = []; state.edges = []; redraw(); });
  on("paste", "click", () => { $("paste-text").value = ""; $("paste-dialog").showModal(); });
  on("paste-dialog", "close", () => {
    if ($("paste-dialog").returnValue === "add") addDocuments(split($("paste-text").value, $("paste-split").value));
  });
  on("stored", "click", pickStored);
  on("stored-dialog", "close", () => {
    if ($("stored-dialog").returnValue !== "add") return;
    addDocuments([...$("stored-list").querySelectorAll("input:checked")].map((box) => makeDocument(box.dataset.title, "", box.value)));
  });

  on("shape", "change", () => {
    const { ask: asked, value } = $("shape").selectedOptions[0].dataset;
    $("shape-asks").hidden = !asked;
    $("shape-asks").querySelector("span").textContent = asked ?? "";
    $("shape-value").value = value ?? "";
  });
  submit("builder", () => {
    const shape = $("shape").value, { ask: asked } = $("shape").selectedOptions[0].dataset;
    const given = $("shape-value").value.trim();
    buildEdges(shape, !asked ? null : asked === "reader" ? String(Number(given) - 1) : given); // people count from 1
  });
  submit("edge-form", () => {
    const source = byKey($("edge-source").value), reader = byKey($("edge-reader").value);
    if (source && reader) addEdge(source, reader);
  });
  on("shown", "change", draw);

  submit("ask-form", ask);
  on("stop", "click", () => state.running?.abort());
  on("question", "keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  on("examples", "change", () => { $("question").value = $("examples").value; edited(); });
  for (const id of ["question", "system", "max-tokens"]) on(id, "input", edited);

  $("key").value = session.key;
  on("key", "change", () => { session.key = $("key").value.trim(); connect(); });
  theme(localStorage.getItem("kvgraph-theme"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(localStorage.getItem("kvgraph-theme")));
  on("theme", "click", () => {
    const other = theme(document.documentElement.dataset.theme) ? "light" : "dark";
    localStorage.setItem("kvgraph-theme", other);
    theme(other);
  });
}

wire();
say("");
state.data = await call("playground/data.json");
await connect();
