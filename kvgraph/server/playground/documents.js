// The list of documents: one box each, opened to edit.

import { $, h, number } from "./dom.js";

let next = 1;

/** A document of the page. `segment`: the id of a stored one, whose text the server has. */
export function makeDocument(title = "", text = "", segment = "") {
  return { key: next++, title, text, segment, open: false };
}

/** What to call a document. */
export function label(doc, index) {
  return doc.title || doc.segment || doc.text.trim().slice(0, 40) || `document ${index + 1}`;
}

/** Several documents from one text. */
export function split(text, how) {
  const parts = text.replace(/\r\n?/g, "\n").split(how === "blank" ? /\n\s*\n/ : /^\s*-{3,}\s*$/m);
  return parts.map((part) => part.trim()).filter(Boolean).map((part) => {
    const titled = part.match(/^#+\s+(.*)\n?/);
    return titled ? makeDocument(titled[1].trim(), part.slice(titled[0].length).trim()) : makeDocument("", part);
  });
}

/** Draws the list; `changed` after every edit, `remove` for a document's button. */
export class DocumentList {
  constructor({ changed, remove }) {
    this.changed = changed;
    this.remove = remove;
    this.list = $("document-list");
    this.sizes = new Map(); // where a document's count of tokens stands
  }

  draw(documents) {
    $("document-count").textContent = documents.length || "";
    this.sizes = new Map();
    this.list.replaceChildren(...documents.map((doc, index) => this.item(doc, index)));
  }

  item(doc, index) {
    const size = h("span", { class: "size quiet" });
    this.sizes.set(doc.key, size);
    const name = h("span", { class: "name" }, label(doc, index));
    const body = h("div", { class: "edit", id: `document-${doc.key}`, hidden: !doc.open }, ...this.fields(doc, () => {
      name.textContent = label(doc, index);
      this.changed();
    }));
    const head = h("button", {
      type: "button", class: "head", "aria-expanded": String(doc.open), "aria-controls": body.id,
      click: () => {
        doc.open = !doc.open;
        body.hidden = !doc.open;
        head.setAttribute("aria-expanded", String(doc.open));
      },
    }, h("span", { class: "index quiet" }, String(index + 1)), name, size);
    const gone = h("button", {
      type: "button", class: "plain cross", "aria-label": `Remove ${label(doc, index)}`, click: () => this.remove(doc),
    }, "×");
    return h("li", { "data-key": doc.key }, h("div", { class: "row" }, head, gone), body);
  }

  fields(doc, edited) {
    if (doc.segment) return [h("p", { class: "quiet" }, `Stored on the server as ${doc.segment}.`)];
    const title = h("input", { autocomplete: "off", input: () => { doc.title = title.value; edited(); } });
    const text = h("textarea", { rows: 6, input: () => { doc.text = text.value; edited(); } });
    title.value = doc.title;
    text.value = doc.text;
    return [h("label", {}, "Title", title), h("label", {}, "Text", text)];
  }

  /** Say how many tokens each document has: counts by the document's key. */
  measure(counts) {
    for (const [key, size] of this.sizes) size.textContent = counts.has(key) ? `${number(counts.get(key))} tok` : "";
  }

  /** Open a document's box and go there. */
  focus(doc) {
    const item = this.list.querySelector(`[data-key="${doc.key}"]`);
    item.scrollIntoView({ block: "nearest" });
    (item.querySelector(".edit:not([hidden]) input") ?? item.querySelector("button")).focus();
  }
}
