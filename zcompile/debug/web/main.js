"use strict";
// The page as a whole: which step, which tab, what is selected, light or dark, search.
zc.selection = null;
zc.held = false;
zc.tab = "time";

Object.assign(zc, {
  async open(number) {
    this.step = await this.part(`step-${number}`);
    this.timeline.mode = "expected";
    this.loaded = null; this.selection = null; this.held = false;
    this.stages = this.head.graphs.filter((graph) => graph.step === this.step.number).map((graph) => graph.stage);
    this.parameterOf = new Map(this.step.parameters.map((row, i) => [row.name, i]));
    this.hopOfRow = new Map(); this.hopsOfUser = new Map();
    this.step.hops.forEach((hop, i) => {
      if (hop.launch >= 0) this.hopOfRow.set(`${hop.phase} ${hop.launch}`, i);
      if (hop.wait >= 0) this.hopOfRow.set(`${hop.waiting} ${hop.wait}`, i);
    });
    document.getElementById("plan").textContent = this.step.plan[0];
    this.cards();
    this.timeline.fill();
    this.tables.start();
    this.detail.show(null);
    this.loaded = await this.graphs();
    this.step.hops.forEach((hop, i) => {
      for (const user of (hop.launch >= 0 && this.loaded[hop.phase]?.rows.users[hop.launch]) || []) {
        const key = `${hop.phase} ${user}`;
        (this.hopsOfUser.get(key) ?? this.hopsOfUser.set(key, []).get(key)).push(i);
      }
    });
    for (const view of [this.graph, this.programs]) if (view.started) await view.open(this.stages.includes(view.stage) ? view.stage : this.stages[0]);
    performance.mark("ready");
    document.documentElement.dataset.ready = "true";
  },

  cards() {
    const { step } = this, share = step.seconds ? (100 * step.exposed) / step.seconds : 0;
    const card = (title, value, under) => this.make("div", "", "card", [this.make("span", title, "dim"), this.make("b", value), this.make("span", under, "dim")]);
    const rows = step.levels.map((level) => {
      const meter = this.make("span", "", "meter", [this.make("i")]);
      meter.firstChild.style.width = `${Math.min(100, 100 * level.share)}%`;
      const cells = [level.level, ...Object.values(level.bytes).map((count) => (count ? this.bytes(count) : "-"))].map((text) => this.make("td", text));
      return this.make("tr", "", "", [...cells, this.make("td", "", "", [meter, ` ${Math.round(100 * level.share)} %`]), this.make("td", level.exposed ? this.seconds(level.exposed) : "-")]);
    });
    const heads = ["bytes received", ...Object.keys(step.levels[0]?.bytes ?? {}), "links busy", "waited for"].map((text) => this.make("th", text));
    document.getElementById("cards").replaceChildren(
      card(step.runs > 1 ? `${step.runs} runs, expected` : "step, expected", this.seconds(step.seconds), `by the data of: ${step.device}`), card("computing", this.seconds(step.computing), "of it"),
      card("waiting for transfers", this.seconds(step.exposed), `${share.toFixed(0)} % of the step`),
      card("memory at its peak", this.bytes(step.memory.peak), `${this.seconds(step.memory.at)} into the step`),
      this.make("div", "", "card", [this.make("table", "", "", [this.make("tr", "", "", heads), ...rows])]));
    const { measured } = step, place = document.getElementById("measured");
    place.hidden = !measured;
    if (measured) {
      this.choice(document.getElementById("modes"), ["expected", "measured"], this.timeline.mode, (mode) => this.timeline.turn(mode));
      const note = document.getElementById("matched");
      note.textContent = `the last step in the trace took ${this.seconds(measured.seconds)}; ${measured.matched_hops} of ${measured.hops} launches and waits and ${measured.matched_operations} of ` +
        `${measured.operations} operations were matched to nodes, ${Math.round(100 * measured.share)} % of the graphs' time` +
        (measured.little ? ": too little to take the measured lanes for this program's" : "");
      note.className = measured.little ? "loud" : "hint";
    }
    const kinds = [...new Set(this.timeline.spans.kind)];
    document.getElementById("legend").replaceChildren(...[...kinds, ...this.timeline.OWNERS].map((kind, i) =>
      this.make("span", "", "", [this.swatch(kind), i < kinds.length ? kind : `${kind} (memory)`])));
  },

  // -- selections ---------------------------------------------------------------------------------------------------------------

  show(selection) {
    this.selection = selection;
    this.detail.show(selection);
    this.timeline.light(selection);
    if (this.tab === "graph") this.graph.light(selection);
    if (this.tab === "programs") this.programs.light(selection);
  },

  hover(selection) {
    if (this.held || JSON.stringify(selection) === JSON.stringify(this.selection)) return;
    this.show(selection);
  },

  hold(selection) { this.held = selection !== null; this.show(selection); },

  reveal(selection) {
    const view = { time: this.timeline, graph: this.graph, programs: this.programs }[this.tab];
    if (view) view.reveal(selection);
  },

  // -- tabs, search, theme ------------------------------------------------------------------------------------------------------

  async turn(tab) {
    this.tab = tab;
    for (const button of document.querySelectorAll("#tabs button")) button.classList.toggle("on", button.dataset.tab === tab);
    for (const section of document.querySelectorAll(".tab")) section.hidden = section.id !== tab;
    const view = { graph: this.graph, programs: this.programs }[tab];
    if (view && !view.started && this.stages.length) { view.started = true; await view.start(); }
    if (view && this.held) await view.reveal(this.selection);
    document.documentElement.dataset.tab = tab;
  },

  find(text) {
    const wanted = text.trim().toLowerCase(), found = [];
    if (!wanted) return found;
    const matches = (name) => name.toLowerCase().includes(wanted);
    this.step.parameters.forEach((row, parameter) => { if (matches(row.name)) found.push(["parameter", row.name, { parameter }]); });
    const modules = new Set();
    for (const graph of Object.values(this.loaded ?? {})) for (const module of graph.modules) if (module.path && matches(module.path)) modules.add(module.path);
    for (const module of modules) found.push(["module", module, { module }]);
    for (const [phase, graph] of Object.entries(this.loaded ?? {})) {
      if (phase === "joint") continue;
      graph.rows.name.forEach((name, row) => { if (found.length < 400 && matches(name)) found.push([phase, name, { phase, row }]); });
    }
    return found;
  },

  search() {
    const input = document.getElementById("search"), list = document.getElementById("found");
    const found = this.find(input.value).slice(0, 60);
    list.hidden = !found.length;
    const choose = (selection) => { list.hidden = true; input.blur(); this.hold(selection); this.reveal(selection); };
    list.replaceChildren(...found.map(([kind, name, selection], i) => {
      const item = this.make("li", "", i ? "" : "on", [this.make("span", kind, "kind"), this.make("span", name, "name")]);
      item.onmousedown = (event) => { event.preventDefault(); choose(selection); };
      return item;
    }));
    input.onkeydown = (event) => {
      const at = [...list.children].findIndex((item) => item.classList.contains("on"));
      if (event.key === "Enter" && found[at]) choose(found[at][2]);
      if (event.key === "Escape") { list.hidden = true; input.blur(); }
      const to = at + { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (list.children[to]) { event.preventDefault(); list.children[at].classList.remove("on"); list.children[to].classList.add("on"); list.children[to].scrollIntoView({ block: "nearest" }); }
    };
  },

  theme(dark) {
    document.documentElement.classList.toggle("dark", dark);
    document.getElementById("theme").textContent = dark ? "Light" : "Dark";
    if (this.step) { this.timeline.colour(); if (this.graph.started) this.graph.draw(); }
  },

  async main() {
    const wants = window.matchMedia("(prefers-color-scheme: dark)");
    this.theme(wants.matches);
    wants.onchange = () => this.theme(wants.matches);
    document.getElementById("theme").onclick = () => this.theme(!document.documentElement.classList.contains("dark"));
    for (const button of document.querySelectorAll("#tabs button")) button.onclick = () => this.turn(button.dataset.tab);
    const steps = document.getElementById("step");
    steps.replaceChildren(...this.head.steps.map((step, i) => Object.assign(this.make("option", step.title), { value: i })));
    steps.hidden = this.head.steps.length < 2;
    steps.onchange = () => this.open(Number(steps.value));
    const search = document.getElementById("search");
    search.oninput = () => this.search();
    search.onfocus = () => this.search();
    search.onblur = () => { document.getElementById("found").hidden = true; };
    document.getElementById("fold").onclick = () => this.graph.foldAll();
    document.getElementById("unfold").onclick = () => this.graph.unfoldLevel();
    document.getElementById("fit").onclick = () => this.graph.fit();
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); search.focus(); }
      if (event.key === "Escape" && document.activeElement !== search) this.hold(null);
    });
    document.getElementById("time-chart").addEventListener("dblclick", () => {
      const [start, end] = this.timeline.whole;
      this.timeline.plot.x_range.setv({ start, end });
    });
    await this.timeline.start();
    await this.open(0);
  },
});

zc.main().catch((error) => {
  console.error(error);
  document.getElementById("detail").replaceChildren(zc.make("h2", "This page could not be drawn"), zc.make("pre", String(error.stack ?? error)));
});
