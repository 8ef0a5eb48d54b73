// One of the two columns: a method with its fields, its plan, and what a request with it gave and cost.

import { call, Failure, stream } from "./api.js";
import { duration, h, number, visible } from "./dom.js";

const TIERS = { memory: "reused from memory", disk: "reused from disk", shared: "shared with a running request" };
const PHASES = [
  ["queued", "queued"], ["encoding", "documents"], ["prefill", "question to first token"], ["decode", "rest of the answer"],
];

export class Column {
  constructor(letter, root, methods, chosen, { changed }) {
    Object.assign(this, { letter, methods, changed });
    this.plan = null;
    this.usage = null;
    this.errors = { plan: null, run: null };
    this.build(root, chosen);
    this.choose(chosen);
  }

  build(root, chosen) {
    const option = (method) => h("option", { value: method.name, selected: method.name === chosen }, method.name);
    const group = (text, preset) => h("optgroup", { label: text }, ...this.methods.filter((m) => m.preset === preset).map(option));
    this.select = h("select", { id: `method-${this.letter}`, change: () => { this.choose(this.select.value); this.changed(); } },
      group("methods", false), group("presets", true));
    this.form = h("div", { class: "fields" });
    this.summary = h("summary");
    this.details = h("details", {
      class: "options", keydown: (event) => {
        if (event.key !== "Escape") return;
        this.details.open = false;
        this.summary.focus();
      },
    }, this.summary, this.form);
    document.addEventListener("pointerdown", (event) => { if (!this.details.contains(event.target)) this.details.open = false; });
    this.state = h("span", { class: "state-text quiet", role: "status" });
    this.note = h("p", { class: "note quiet" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.figures = h("dl", { class: "figures" });
    this.answer = h("div", { class: "answer", id: `answer-${this.letter}`, tabindex: 0, dir: "auto", role: "region", "aria-label": `Answer of ${this.letter}` });
    this.tokens = h("figure", { class: "tokens" });
    this.times = h("figure", { class: "times" });
    root.replaceChildren(
      h("div", { class: "bar" },
        h("h2", {}, h("span", { class: "letter-badge" }, this.letter)), h("label", { class: "hidden", for: this.select.id }, `Method ${this.letter}`),
        this.select, this.details, this.state),
      this.note, this.error, this.figures, this.answer, this.tokens, this.times,
    );
    this.clear();
  }

  // -- the method ------------------------------------------------------------------------------------------------------

  choose(name) {
    this.method = this.methods.find((method) => method.name === name);
    this.controls = this.method.fields.map((field) => this.control(field));
    this.form.replaceChildren(...this.controls.map(({ field, input }) => h("label", {}, field.name, input)));
    this.details.hidden = !this.controls.length;
    this.plan = null;
    this.describe();
  }

  control(field) {
    const edited = () => { this.describe(); this.changed(); };
    if (field.choices) {
      const input = h("select", { change: edited }, ...field.choices.map((choice) => h("option", { value: String(choice) }, String(choice))));
      input.value = String(field.value);
      return { field, input, value: () => field.choices[input.selectedIndex] };
    }
    const input = h("input", {
      type: "number", step: field.whole ? 1 : "any", input: edited, placeholder: field.value ?? "auto", size: 6,
    });
    return { field, input, value: () => (input.value === "" ? field.value : Number(input.value)) };
  }

  describe() {
    const told = this.controls.filter(({ field, value }) => value() !== null && (field.choices || value() !== field.value || field.name === "rounds"));
    this.summary.textContent = told.map(({ field, value }) => `${field.name} ${value()}`).join(", ") || "options";
  }

  /** The request's `kvgraph` object, without edges. */
  options() {
    const changed = this.controls.filter(({ field, value }) => value() !== field.value);
    return { method: this.method.name, ...Object.fromEntries(changed.map(({ field, value }) => [field.name, value()])) };
  }

  // -- the plan --------------------------------------------------------------------------------------------------------

  /** Ask what a request would do now. */
  async look(body) {
    this.planning?.abort();
    const mine = (this.planning = new AbortController());
    try {
      this.plan = await call("v1/plan", body, mine.signal);
      this.tell("plan", null);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.plan = null;
      this.tell("plan", error);
    }
  }

  /** The spans of this column's plan that are versions of a document, the newest last. */
  versions(index) {
    return (this.plan?.spans ?? []).filter((span) => span.segment === index).sort((a, b) => a.round - b.round);
  }

  // -- a request -------------------------------------------------------------------------------------------------------

  clear() {
    this.usage = null;
    this.tell("run", null);
    this.figures.replaceChildren(...["TTFT", "Seen here", "Computed", "Reused"].map((name) => figure(name, "–")));
    this.answer.replaceChildren();
    this.tokens.replaceChildren(h("figcaption", { class: "quiet" }, "Tokens computed and reused"));
    this.times.replaceChildren(h("figcaption", { class: "quiet" }, "Time"));
  }

  /** Show what went wrong with the last run, else with the plan; null takes it back. */
  tell(what, error) {
    this.errors[what] = error;
    const told = this.errors.run ?? this.errors.plan;
    this.error.hidden = told === null;
    this.error.textContent = told?.message ?? "";
  }

  /** Send a request and show its answer as it comes. The run's facts, or null if it was stopped or failed. */
  async run(path, body, signal) {
    this.clear();
    this.state.textContent = "waiting…";
    this.answer.classList.add("running");
    const started = performance.now();
    let seen = null, ending = "";
    try {
      for await (const event of stream(path, body, signal)) {
        const choice = event.choices[0];
        if (choice) {
          if (seen === null) {
            seen = (performance.now() - started) / 1000;
            this.state.textContent = "answering…";
          }
          this.answer.append(visible(choice.delta?.content ?? choice.text ?? ""));
          ending = choice.finish_reason ?? ending;
        }
        this.usage = event.usage ?? this.usage;
      }
      if (!this.usage) throw new Failure("the answer came without its usage");
    } catch (error) {
      this.state.textContent = error.name === "AbortError" ? "stopped" : "failed";
      if (error.name !== "AbortError") this.tell("run", error);
      return null;
    } finally {
      this.answer.classList.remove("running");
    }
    this.state.textContent = ending === "length" ? "token limit" : "done";
    return this.report(seen);
  }

  report(seen) {
    const { kvgraph: cost, completion_tokens: answer } = this.usage;
    const reused = sum(Object.values(cost.reused_tokens));
    this.figures.replaceChildren(
      figure("TTFT", duration(cost.ttft), "from the request's arrival in the engine to its first token"),
      figure("Seen here", duration(seen), "from the click to the first token in this page"),
      figure("Computed", number(cost.computed_tokens), "tokens that ran through the model before the first token"),
      figure("Reused", number(reused), "tokens whose KV was found"),
    );
    const perToken = answer > 1 ? cost.decode / (answer - 1) : null;
    return { letter: this.letter, label: this.label(), seen, reused, perToken, answer, cost };
  }

  /** The method with what was changed of it. */
  label() {
    const { method, ...changed } = this.options();
    return [method, ...Object.entries(changed).map(([name, value]) => `${name} ${value}`)].join(", ");
  }

  /** The numbers that bars are drawn to: all tokens, all seconds. */
  extent() {
    if (!this.usage) return { tokens: 0, seconds: 0 };
    const { computed_tokens: computed, reused_tokens: reused, ttft, decode } = this.usage.kvgraph;
    return { tokens: computed + sum(Object.values(reused)), seconds: ttft + decode };
  }

  /** Draw the bars, to the scale of both columns. */
  bars({ tokens, seconds }) {
    if (!this.usage) return;
    const cost = this.usage.kvgraph;
    const live = cost.computed_tokens - cost.document_tokens_computed;
    this.tokens.replaceChildren(...bar("Tokens", tokens, number, [
      ["computed", "documents computed", cost.document_tokens_computed], ["live", "question", live],
      ...Object.entries(cost.reused_tokens).map(([tier, n]) => [tier in TIERS ? tier : "disk", TIERS[tier] ?? `reused from ${tier}`, n]),
    ]));
    const ends = [0, cost.queued, cost.encoded, cost.ttft, cost.ttft + cost.decode];
    this.times.replaceChildren(...bar("Time", seconds, duration, PHASES.map(([kind, name], i) => [kind, name, Math.max(0, ends[i + 1] - ends[i])])));
  }
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

function figure(name, value, title = "") {
  return h("div", { title }, h("dt", {}, name), h("dd", {}, value));
}

/** A stacked bar with its legend; parts are [kind, name, value]. */
function bar(title, whole, written, parts) {
  const shown = parts.filter(([, , value]) => value > 0);
  const strip = h("div", { class: "strip", "aria-hidden": "true" }, ...shown.map(([kind, name, value]) => {
    const piece = h("span", { class: `piece ${kind}`, title: `${name}: ${written(value)}` });
    piece.style.width = `${(100 * value) / whole}%`;
    return piece;
  }));
  const keys = parts.map(([kind, name, value]) => h("li", { "data-kind": kind, "data-value": value }, h("span", { class: `swatch ${kind}` }), `${name} `, h("b", {}, written(value))));
  return [h("figcaption", {}, title), strip, h("ul", { class: "keys" }, ...keys)];
}
