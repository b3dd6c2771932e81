"use strict";
// What the page knows: the head at once, steps and graphs when they are asked for.
window.zc = {
  head: JSON.parse(document.getElementById("head").textContent),
  charts: JSON.parse(document.getElementById("charts").textContent),
  parts: new Map(),

  // The unpacked part of that name, "step-0" or "graph-0": a promise, the same one each time.
  part(name) {
    if (!this.parts.has(name)) this.parts.set(name, this.unpack(name));
    return this.parts.get(name);
  },

  async unpack(name) {
    const text = atob(document.getElementById(name).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  },

  // The graphs of the step that is shown: {forward: graph, ...}, each with its lookups.
  async graphs() {
    const found = {};
    for (const [number, head] of this.head.graphs.entries()) {
      if (head.step === this.step.number) found[head.stage] = await this.part(`graph-${number}`);
    }
    for (const graph of Object.values(found)) {
      graph.at ??= new Map(graph.rows.name.map((name, row) => [name, row]));
    }
    return found;
  },

  bytes(count) {
    if (count < 1000) return `${count} B`;
    const units = ["kB", "MB", "GB", "TB"];
    let unit = -1, amount = count;
    do { amount /= 1000; unit++; } while (amount >= 999.5 && unit < 3);
    return `${amount.toPrecision(3)} ${units[unit]}`;
  },

  seconds(value) {
    for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["us", 1e-6]]) {
      if (value >= scale || unit === "us") return `${(value / scale).toPrecision(3)} ${unit}`.replace("e+", "e");
    }
  },

  colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim() || "#888888"; },

  // An element with text, which is never read as HTML.
  make(tag, text = "", kind = "", children = []) {
    const made = document.createElement(tag);
    if (text !== "") made.textContent = text;
    if (kind) made.className = kind;
    made.append(...children);
    return made;
  },

  swatch(name) {
    const made = this.make("span", "", "swatch");
    made.style.background = `var(--${name})`;
    return made;
  },

  // A row of buttons, one of which is on.
  choice(place, names, chosen, choose) {
    place.replaceChildren(...names.map((name) => {
      const button = this.make("button", name, name === chosen ? "on" : "");
      button.onclick = () => choose(name);
      return button;
    }));
  },
};
