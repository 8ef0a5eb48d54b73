// The drawing: documents as boxes, reads as arrows. Drag a box to move it; click a source, then its reader, to add an edge.

import { s } from "./dom.js";

const HEIGHT = 56; // of a box
const GAP = 12;
const WIDEST = 138;
const NARROWEST = 80;
const PILL = { width: 84, height: 24 };
const CHARACTER = 6.2; // width of one, about

/** Nodes: {id, title, kind, states: [{label, tiers}], description}; edges: {source, reader, editable, live}. */
export class Drawing {
  constructor(svg, { connect, disconnect, inspect, say }) {
    Object.assign(this, { svg, connect, disconnect, inspect, say });
    this.nodes = [];
    this.edges = [];
    this.moved = new Map(); // where somebody dragged a node to
    this.picked = null; // the source of an edge being drawn
    this.focus = null;
    svg.addEventListener("keydown", (event) => { if (event.key === "Escape") this.pick(null); });
    svg.addEventListener("click", (event) => { if (event.target === svg) this.pick(null); });
    svg.addEventListener("pointermove", (event) => this.stretch(event));
    new ResizeObserver(([entry]) => { if (entry.contentRect.width !== this.plan?.width) this.draw(); }).observe(svg.parentElement);
  }

  /** Show these nodes and edges. `arranged`: the edges that boxes are placed by, whatever is shown. */
  show(nodes, edges, arranged = edges) {
    Object.assign(this, { nodes, edges, arranged });
    const ids = new Set(nodes.map((node) => node.id));
    if (!ids.has(this.picked)) this.picked = null;
    this.draw();
  }

  draw() {
    if (this.held) { // new boxes would lose the drag or the click
      this.late = true;
      return;
    }
    this.late = false;
    const focused = this.svg.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    this.plan = layout(this.nodes, this.arranged ?? [], this.svg.parentElement.clientWidth);
    const { width, height } = this.plan;
    this.svg.classList.toggle("dense", this.edges.length > 40);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.lines = this.edges.map((edge) => this.line(edge));
    this.boxes = new Map(this.nodes.map((node) => [node.id, this.box(node)]));
    this.rubber = s("path", { class: "rubber" });
    this.svg.replaceChildren(
      s("defs", {}, marker("arrow"), marker("arrow-active")),
      s("g", {}, ...this.lines.map((line) => line.element)),
      this.rubber,
      s("g", {}, ...this.boxes.values()),
    );
    this.place();
    if (focused) this.boxes.get(focused)?.focus({ preventScroll: true });
    this.mark();
  }

  at(id) {
    return this.moved.get(id) ?? this.plan.places.get(id);
  }

  size(id) {
    return this.nodes.find((node) => node.id === id).kind === "document"
      ? { width: this.plan.box, height: HEIGHT } : PILL;
  }

  /** Put boxes and lines where they belong. */
  place() {
    for (const [id, box] of this.boxes) box.setAttribute("transform", `translate(${this.at(id).x} ${this.at(id).y})`);
    for (const { edge, paths } of this.lines) {
      const d = curve(this.at(edge.source), this.size(edge.source), this.at(edge.reader), this.size(edge.reader));
      for (const path of paths) path.setAttribute("d", d);
    }
  }

  line(edge) {
    const path = s("path", { class: "edge", "marker-end": "url(#arrow)" });
    const element = s("g", {
      class: `line ${edge.editable ? "editable" : ""} ${edge.live ? "live" : ""}`,
      "data-source": edge.source, "data-reader": edge.reader,
    }, path);
    const paths = [path];
    if (edge.editable) {
      paths.push(s("path", { class: "reach", click: () => this.disconnect(edge) }, s("title", {}, edge.title)));
      element.append(paths[1]);
    }
    return { edge, element, paths, path };
  }

  box(node) {
    const { width, height } = this.size(node.id);
    const isDocument = node.kind === "document";
    const group = s("g", {
      class: `node ${node.kind}`, tabindex: 0, role: isDocument ? "button" : "img", "data-id": node.id,
      "aria-label": node.description,
      click: () => {
        if (!this.dragged && isDocument) this.choose(node);
        this.dragged = false;
      },
      keydown: (event) => {
        if (isDocument && (event.key === "Enter" || event.key === " ")) {
          event.preventDefault();
          this.choose(node);
        }
      },
      pointerdown: (event) => this.drag(event, node, group),
      pointerenter: () => this.look(node.id),
      pointerleave: () => this.look(null),
      focus: () => this.look(node.id),
      blur: () => this.look(null),
    },
    s("rect", { class: "back", x: -width / 2, y: -height / 2, width, height, rx: isDocument ? 6 : 12 }),
    ...(isDocument ? this.face(node, width) : [text(node.title, 0, 4)]),
    s("rect", { class: "ring", x: -width / 2, y: -height / 2, width, height, rx: isDocument ? 6 : 12 }));
    return group;
  }

  /** What a document's box holds: its title, and for each method one dot a version. */
  face(node, width) {
    const lines = wrapped(node.title, Math.floor((width - 12) / CHARACTER));
    const parts = lines.map((line, i) => text(line, 0, (lines.length === 1 ? -7 : -13) + 13 * i, "title"));
    const half = width / node.states.length;
    node.states.forEach((state, i) => {
      const left = -width / 2 + half * i;
      parts.push(s("rect", {
        class: "state", "data-method": state.label, "data-state": summary(state.tiers),
        x: left + (i ? 0.5 : 1), y: 10, width: half - 1.5, height: 17, rx: 4,
      }));
      parts.push(text(state.label, left + 9, 22.5, "letter"));
      const shown = state.tiers.slice(-Math.max(1, Math.floor((half - 18) / 10)));
      shown.forEach((tier, j) => parts.push(...pip(tier, left + 21 + 10 * j, 18.5)));
    });
    return parts;
  }

  // -- what people do --------------------------------------------------------------------------------------------------

  choose(node) {
    if (this.picked === null) return this.pick(node.id);
    const source = this.picked;
    this.pick(null);
    if (source !== node.id) this.connect(source, node.id);
  }

  pick(id) {
    this.picked = id;
    this.rubber.setAttribute("d", "");
    this.say(id === null ? "" : `Now choose who reads “${this.nodes.find((node) => node.id === id).title}”. Esc cancels.`);
    this.mark();
  }

  look(id) {
    this.focus = id;
    this.mark();
    if (id !== null) this.inspect(id);
  }

  drag(down, node, group) {
    const from = this.point(down), start = this.at(node.id);
    this.dragged = false;
    this.held = true;
    group.setPointerCapture(down.pointerId);
    const move = (event) => {
      const to = this.point(event);
      if (!this.dragged && Math.hypot(to.x - from.x, to.y - from.y) < 4) return;
      this.dragged = true;
      const { width, height } = this.plan;
      this.moved.set(node.id, { x: clamp(start.x + to.x - from.x, 20, width - 20), y: clamp(start.y + to.y - from.y, 20, height - 20) });
      this.place();
    };
    const up = () => {
      group.removeEventListener("pointermove", move);
      group.removeEventListener("pointerup", up);
      group.removeEventListener("pointercancel", up);
      setTimeout(() => { // after the click that follows
        this.held = false;
        if (this.late) this.draw();
      });
    };
    group.addEventListener("pointermove", move);
    group.addEventListener("pointerup", up);
    group.addEventListener("pointercancel", up);
  }

  /** The line from the picked source to the pointer. */
  stretch(event) {
    if (this.picked === null || event.pointerType === "touch") return;
    const a = this.at(this.picked), b = this.point(event);
    this.rubber.setAttribute("d", `M${a.x} ${a.y}L${b.x} ${b.y}`);
  }

  point(event) {
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    return { x: p.x, y: p.y };
  }

  /** Light up the node that is looked at, its edges, and their other ends. */
  mark() {
    const near = new Set([this.focus]);
    for (const { edge, element, path } of this.lines) {
      const active = this.focus !== null && (edge.source === this.focus || edge.reader === this.focus);
      if (active) near.add(edge.source).add(edge.reader);
      element.classList.toggle("active", active);
      path.setAttribute("marker-end", active ? "url(#arrow-active)" : "url(#arrow)");
    }
    for (const [id, box] of this.boxes) {
      box.classList.toggle("near", near.has(id));
      box.classList.toggle("picked", id === this.picked);
    }
    this.svg.classList.toggle("looking", this.focus !== null && near.size > 1);
  }
}

/** One word for the versions of a document: their tier if all have the same, miss if none has any, else partly. */
export function summary(tiers) {
  if (!tiers.length) return "none";
  if (tiers.every((tier) => tier === null)) return "miss";
  if (tiers.some((tier) => tier === null)) return "partly";
  return tiers.every((tier) => tier === "memory") ? "memory" : "stored";
}

function pip(tier, x, y) {
  const circle = s("circle", { class: `pip ${tier === "memory" ? "memory" : ""}`, cx: x, cy: y, r: 4 });
  return tier === null || tier === "memory" ? [circle] : [circle, s("path", { class: "pip half", d: `M${x} ${y - 4}a4 4 0 0 0 0 8z` })];
}

function text(content, x, y, className = "") {
  return s("text", { x, y, class: className }, content);
}

function marker(id) {
  return s("marker", { id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
    s("path", { d: "M0 0.8L7.4 4L0 7.2z" }));
}

/** A title on at most two lines of `most` characters. */
function wrapped(title, most) {
  const lines = [""];
  for (const word of title.split(/\s+/)) {
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (longer.length <= most || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  if (lines.length > 2) lines.splice(1, lines.length, lines.slice(1).join(" "));
  return lines.map((line) => (line.length > most ? `${line.slice(0, most - 1).trimEnd()}…` : line));
}

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

// -- where boxes stand ---------------------------------------------------------------------------------------------------

/** Places of all nodes: layers along the edges, a ring if the edges have a cycle, a grid without edges. */
function layout(nodes, edges, width) {
  const documents = nodes.filter((node) => node.kind === "document").map((node) => node.id);
  const between = edges.filter((edge) => edge.source !== edge.reader && documents.includes(edge.source) && documents.includes(edge.reader));
  const layers = layered(documents, between);
  const arranged = !between.length ? grid(documents, width) : layers ? inLayers(layers, between, width) : ring(documents, width);
  const pills = nodes.filter((node) => node.kind !== "document");
  const bottom = arranged.height;
  pills.forEach((node, i) => {
    const x = pills.length === 1 || i ? arranged.width - PILL.width / 2 - 4 : PILL.width / 2 + 4;
    arranged.places.set(node.id, { x, y: bottom + PILL.height / 2 + 4 });
  });
  return { ...arranged, height: bottom + (pills.length ? PILL.height + 10 : 0) };
}

function grid(ids, width) {
  const box = Math.min(WIDEST, width - GAP);
  const columns = Math.max(1, Math.min(ids.length, Math.floor(width / (box + GAP))));
  const rows = Math.ceil(ids.length / columns), pitch = width / columns;
  const height = Math.max(240, rows * (HEIGHT + 2 * GAP));
  const places = new Map(ids.map((id, i) => [id, {
    x: pitch * (i % columns + 0.5), y: height * (Math.floor(i / columns) + 0.5) / Math.max(1, rows),
  }]));
  return { places, width, height, box };
}

/** Boxes on an ellipse, evenly along its line, as high as they need to stand apart. */
function ring(ids, width) {
  const box = Math.min(WIDEST - 20, width / 3.2);
  for (let height = 290; ; height += 40) {
    const rx = width / 2 - box / 2 - 4, ry = height / 2 - HEIGHT / 2 - 6;
    const points = Array.from({ length: 721 }, (_, i) => {
      const angle = (i * Math.PI) / 360 - Math.PI / 2;
      return { x: width / 2 + rx * Math.cos(angle), y: height / 2 + ry * Math.sin(angle) };
    });
    const way = [0];
    for (let i = 1; i < points.length; i++) way.push(way[i - 1] + Math.hypot(points[i].x - points[i - 1].x, points[i].y - points[i - 1].y));
    const placed = ids.map((_, i) => points[way.findIndex((length) => length >= (i * way.at(-1)) / ids.length)]);
    const apart = placed.every((p, i) => placed.slice(0, i).every((q) => Math.abs(p.x - q.x) > box + 4 || Math.abs(p.y - q.y) > HEIGHT + 4));
    if (apart || height > 100 * ids.length) return { places: new Map(ids.map((id, i) => [id, placed[i]])), width, height, box };
  }
}

/** Documents by the length of the longest path that leads to them; null when there is a cycle. */
function layered(ids, edges) {
  const depth = new Map(), open = new Map(ids.map((id) => [id, edges.filter((edge) => edge.reader === id).length]));
  let free = ids.filter((id) => !open.get(id));
  free.forEach((id) => depth.set(id, 0));
  while (free.length) {
    const following = [];
    for (const id of free) {
      for (const edge of edges.filter((e) => e.source === id)) {
        depth.set(edge.reader, Math.max(depth.get(edge.reader) ?? 0, depth.get(id) + 1));
        open.set(edge.reader, open.get(edge.reader) - 1);
        if (!open.get(edge.reader)) following.push(edge.reader);
      }
    }
    free = following;
  }
  if ([...open.values()].some((left) => left > 0)) return null;
  const layers = [];
  for (const id of ids) (layers[depth.get(id)] ??= []).push(id);
  return layers;
}

/** Layers from left to right, or from top to bottom where that is too narrow. */
function inLayers(layers, edges, width) {
  const places = new Map();
  const sorted = layers.map((layer, c) => {
    const where = (id) => mean(edges.filter((edge) => edge.reader === id).map((edge) => places.get(edge.source)?.order ?? 0));
    const order = c ? layer.map((id) => [where(id), id]).sort((a, b) => a[0] - b[0]).map(([, id]) => id) : layer;
    order.forEach((id, j) => places.set(id, { order: (j + 0.5) / order.length }));
    return order;
  });
  const pitch = width / layers.length;
  if (pitch - GAP >= NARROWEST) {
    const box = Math.min(WIDEST, pitch - GAP);
    const height = Math.max(286, Math.max(...layers.map((layer) => layer.length)) * (HEIGHT + GAP) + 2 * GAP);
    sorted.forEach((layer, c) => layer.forEach((id, j) => {
      const room = height / layer.length, swing = Math.min(room / 2 - HEIGHT / 2 - 4, 0.15 * height);
      places.set(id, { x: pitch * (c + 0.5), y: room * (j + 0.5) + swing * (c % 2 ? 1 : -1) });
    }));
    return { places, width, height, box };
  }
  const box = Math.min(WIDEST, Math.max(NARROWEST, width / 3 - GAP)), most = Math.max(1, Math.floor(width / (box + 8)));
  const rows = sorted.flatMap((layer) => Array.from({ length: Math.ceil(layer.length / most) }, (_, i) => layer.slice(i * most, (i + 1) * most)));
  rows.forEach((row, r) => row.forEach((id, j) => {
    const swing = row.length === 1 ? (r % 2 ? 0.16 : -0.16) * width : 0;
    places.set(id, { x: (width / row.length) * (j + 0.5) + swing, y: (HEIGHT + 2 * GAP) * (r + 0.5) });
  }));
  return { places, width, height: rows.length * (HEIGHT + 2 * GAP), box };
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / (values.length || 1);

/** A bent arrow from the border of one box to the border of another; a loop for a document that reads itself. */
function curve(a, sizeA, b, sizeB) {
  if (a === b) {
    const top = a.y - sizeA.height / 2;
    return `M${a.x - 12} ${top}C${a.x - 24} ${top - 22} ${a.x + 24} ${top - 22} ${a.x + 12} ${top}`;
  }
  const bend = 0.1;
  const middle = { x: (a.x + b.x) / 2 + bend * (b.y - a.y), y: (a.y + b.y) / 2 - bend * (b.x - a.x) };
  const start = border(a, sizeA, middle, 0), end = border(b, sizeB, middle, 3);
  return `M${start.x} ${start.y}Q${middle.x} ${middle.y} ${end.x} ${end.y}`;
}

/** Where the way from a box's centre to a point leaves the box, and `apart` further. */
function border(centre, size, point, apart) {
  const dx = point.x - centre.x, dy = point.y - centre.y, length = Math.hypot(dx, dy) || 1;
  const inside = Math.min(size.width / 2 / Math.abs(dx || 1e-9), size.height / 2 / Math.abs(dy || 1e-9));
  const t = Math.min(1, inside + apart / length);
  return { x: round(centre.x + dx * t), y: round(centre.y + dy * t) };
}

const round = (value) => Math.round(value * 10) / 10;
