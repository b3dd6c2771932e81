"use strict";
// The timeline and memory under it. A selection is {hop}, {phase, row}, {parameter} or {module}; `light` shows what belongs to it.
zc.timeline = {
  MS: 1e3,
  mode: "expected",

  get spans() { return this.mode === "measured" ? zc.step.measured.spans : zc.step.spans; },
  get seconds() { return this.mode === "measured" ? zc.step.measured.seconds : zc.step.seconds; },

  // Expected or measured, where a trace was read.
  turn(mode) {
    this.mode = mode;
    this.fill();
    zc.cards();
  },

  async start() {
    const views = await Bokeh.embed.embed_item(zc.charts.time);
    this.document = (Array.isArray(views) ? views[0] : [...views][0]).model.document;
    this.plot = this.document.get_model_by_name("timeline");
    this.memory = this.document.get_model_by_name("memory");
    this.plot.x_range.properties.start.change.connect(() => this.nameAt());
    this.source = (name) => this.document.get_model_by_name(name);
  },

  fill() {
    const { lanes, owners } = zc.step, spans = this.spans;
    const count = lanes.length, ms = (list) => list.map((value) => value * this.MS);
    this.top = (lane) => count - lanes.indexOf(lane) - 0.08;
    this.index();
    this.plot.y_range.setv({ start: 0, end: count + 0.3, reset_start: 0, reset_end: count + 0.3 });
    const ticks = lanes.map((lane) => this.top(lane) - 0.42);
    const axis = this.plot.left[0];
    axis.ticker.ticks = ticks;
    axis.major_label_overrides = new Map(lanes.map((lane, i) => [ticks[i], lane]));
    const end = (this.seconds || 1e-6) * this.MS, range = this.plot.x_range;
    range.setv({ start: -0.01 * end, end: 1.01 * end, reset_start: -0.01 * end, reset_end: 1.01 * end, bounds: [-0.05 * end, 1.05 * end] });
    this.whole = [-0.01 * end, 1.01 * end];
    const n = spans.lane.length;
    this.left = ms(spans.begin); this.right = ms(spans.end);
    this.tops = spans.lane.map(this.top); this.bottoms = this.tops.map((top) => top - 0.84);
    const peak = Math.max(1, zc.step.memory.peak), [unit, scale] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]].find(([, size]) => peak >= size);
    this.memory.left[0].axis_label = unit;
    const at = [0, ...ms(owners.at), end], data = { at };
    let below = at.map(() => 0);
    for (const owner of this.OWNERS) {
      const values = [0, ...owners[owner], owners[owner].at(-1) ?? 0];
      const above = below.map((value, i) => value + (values[i] || 0) / scale);
      data[`${owner}_from`] = below; data[`${owner}_to`] = above;
      below = above;
    }
    data.total = below;
    this.source("memory-owners").data = data;
    this.memory.visible = this.mode === "expected";
    this.memory.y_range.setv({ start: 0, end: 1.08 * Math.max(1e-9, ...below) });
    this.colour();
    if (n === 0) zc.show(null);
  },

  OWNERS: ["weights", "activations", "gathered", "gradients", "wire"],

  // Whose span is where: by parameter, by hop, by row of a graph.
  index() {
    const spans = this.spans;
    this.ofParameter = new Map(); this.ofHop = new Map(); this.ofRow = new Map();
    const add = (map, key, i) => (map.get(key) ?? map.set(key, []).get(key)).push(i);
    for (let i = 0; i < spans.lane.length; i++) {
      for (const parameter of spans.parameters[i]) add(this.ofParameter, parameter, i);
      if (spans.hop[i] >= 0) add(this.ofHop, spans.hop[i], i);
      if (spans.row[i] >= 0) add(this.ofRow, `${spans.phase[i]} ${spans.row[i]}`, i);
    }
  },

  colour() {
    const spans = this.spans, colours = new Map();
    const fill = spans.kind.map((kind) => colours.get(kind) ?? colours.set(kind, zc.colour(kind)).get(kind));
    this.fills = fill;
    this.source("timeline-spans").data = { left: this.left, right: this.right, top: this.tops, bottom: this.bottoms, fill, index: fill.map((_, i) => i) };
    for (const renderer of this.memory.renderers) if (this.OWNERS.includes(renderer.name)) renderer.glyph.setv({ fill_color: zc.colour(renderer.name) });
    this.phases();
    const text = zc.colour("dim"), line = zc.colour("line");
    for (const plot of [this.plot, this.memory]) {
      for (const axis of [...plot.left, ...plot.below]) axis.setv({ major_label_text_color: text, axis_label_text_color: text, major_tick_line_color: line });
    }
    this.light(zc.selection);
  },

  // The strip above the lanes: which phase of the step the graph is in.
  phases() {
    const { lanes } = zc.step, spans = this.spans, reach = new Map(), count = lanes.length;
    spans.phase.forEach((phase, i) => {
      if (spans.lane[i] !== "compute") return;
      const [from, to] = reach.get(phase) ?? [Infinity, 0];
      reach.set(phase, [Math.min(from, this.left[i]), Math.max(to, this.right[i])]);
    });
    const names = [...reach.keys()], ends = [...reach.values()], fill = zc.colour("module");
    this.source("timeline-phases").data = {
      left: ends.map((end) => end[0]), right: ends.map((end) => end[1]), top: names.map(() => count + 0.3), bottom: names.map(() => count + 0.02),
      fill: names.map(() => fill), index: names.map((_, i) => i),
    };
    this.ends = ends;
    this.source("timeline-names").data = { x: ends.map((end) => end[0]), y: names.map(() => count + 0.16), text: names, color: names.map(() => zc.colour("dim")) };
  },

  // A phase's name stands at its beginning, or where its visible part begins.
  nameAt() {
    if (!this.ends) return;
    const { start } = this.plot.x_range, source = this.source("timeline-names");
    source.data = { ...source.data, x: this.ends.map(([from, to]) => (to > start ? Math.max(from, start) : from)) };
  },

  // What a selection brings to light: its own spans, and those of what it is related to.
  related(selection) {
    const own = new Set(), other = new Set(), hops = new Set();
    const all = (map, key, into) => { for (const i of map.get(key) ?? []) into.add(i); };
    const users = (hop) => {
      const { phase, launch } = zc.step.hops[hop], rows = zc.loaded?.[phase]?.rows;
      for (const user of (launch >= 0 && rows?.users[launch]) || []) all(this.ofRow, `${phase} ${user}`, other);
    };
    if (selection.hop !== undefined) {
      hops.add(selection.hop); all(this.ofHop, selection.hop, own); users(selection.hop);
      for (const name of zc.step.hops[selection.hop].parameters) all(this.ofParameter, zc.parameterOf.get(name), other);
    } else if (selection.parameter !== undefined) {
      all(this.ofParameter, selection.parameter, own);
      for (const hop of zc.step.parameters[selection.parameter].hops) { hops.add(hop); users(hop); }
    } else if (selection.row !== undefined) {
      all(this.ofRow, `${selection.phase} ${selection.row}`, own);
      for (const hop of zc.hopsOfUser.get(`${selection.phase} ${selection.row}`) ?? []) { hops.add(hop); all(this.ofHop, hop, other); }
    } else if (selection.module !== undefined) {
      for (const [phase, graph] of Object.entries(zc.loaded ?? {})) {
        graph.rows.module.forEach((path, row) => {
          if (path === selection.module || path.startsWith(`${selection.module}.`)) all(this.ofRow, `${phase} ${row}`, own);
        });
      }
    }
    for (const i of own) other.delete(i);
    return { own: [...own], other: [...other], hops: [...hops] };
  },

  light(selection) {
    const empty = { left: [], right: [], top: [], bottom: [], fill: [], index: [] };
    if (!selection || !this.plot) {
      if (!this.plot || !this.isLit) return;
      this.isLit = false;
      this.source("timeline-veil").data = empty;
      this.source("timeline-lit").data = { ...empty, edge: [] };
      this.source("timeline-arrows").data = { x0: [], y0: [], x1: [], y1: [] };
      return;
    }
    this.isLit = true;
    const { own, other, hops } = this.related(selection), lit = [...other, ...own], edge = zc.colour("lit");
    const pick = (list) => lit.map((i) => list[i]);
    const count = zc.step.lanes.length;
    this.source("timeline-veil").data = { left: [-1e9], right: [1e9], top: [count + 1], bottom: [-1], fill: [zc.colour("page")], index: [0] };
    this.source("timeline-lit").data = {
      left: pick(this.left), right: pick(this.right), top: pick(this.tops), bottom: pick(this.bottoms), fill: pick(this.fills), index: lit,
      edge: lit.map((_, i) => (i < other.length ? null : edge)),
    };
    const waited = this.mode === "measured" ? [] : hops.map((hop) => zc.step.hops[hop]).filter((hop) => hop.wait >= 0 && hop.exposed > 0);
    this.source("timeline-arrows").data = {
      x0: waited.map((hop) => hop.end * this.MS), y0: waited.map((hop) => this.top(hop.level) - 0.42),
      x1: waited.map((hop) => hop.end * this.MS), y1: waited.map(() => this.top("compute") - 0.84),
    };
  },

  // Bring a selection's spans into view, if none of them is.
  reveal(selection) {
    const { own, other } = this.related(selection), all = own.length ? own : other;
    if (!all.length) return;
    const from = Math.min(...all.map((i) => this.left[i])), to = Math.max(...all.map((i) => this.right[i])), range = this.plot.x_range;
    if (to < range.start || from > range.end) {
      const width = Math.max(to - from, range.end - range.start);
      range.setv({ start: (from + to - width) / 2, end: (from + to + width) / 2 });
    }
  },

  selectionOf(i) {
    const spans = this.spans;
    return spans.hop[i] >= 0 ? { hop: spans.hop[i] } : { phase: spans.phase[i], row: spans.row[i] };
  },
};

zc.hoverSpan = (data) => {
  const indices = data.index.indices;
  zc.hover(indices.length ? zc.timeline.selectionOf(indices[indices.length - 1]) : null);
};
zc.tapSpan = (data) => {
  const indices = data.source.selected.indices;
  if (indices.length) zc.hold(zc.timeline.selectionOf(indices[indices.length - 1]));
};
zc.tapTimeline = () => { if (!zc.timeline.source("timeline-spans").selected.indices.length) zc.hold(null); };
zc.hoverMemory = (data) => {
  const x = data.geometry.x / zc.timeline.MS, at = zc.step.owners.at;
  if (zc.held || !at.length || !Number.isFinite(x)) return;
  let low = 0, high = at.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (at[middle] <= x) low = middle; else high = middle - 1; }
  zc.detail.memory(low, x);
};
