"use strict";
// A graph folded by module. Python has put each module's children into layers; here they become boxes, as far as modules are open.
zc.graph = {
  GAP: 0.9, HEAD: 1.3, WRAP: 60,

  async start() {
    const views = await Bokeh.embed.embed_item(zc.charts.graph);
    this.document = (Array.isArray(views) ? views[0] : [...views][0]).model.document;
    this.plot = this.document.get_model_by_name("graph");
    this.source = (name) => this.document.get_model_by_name(`graph-${name}`);
    for (const range of [this.plot.x_range, this.plot.y_range]) range.properties.start.change.connect(() => this.scale());
    await this.open(zc.stages.includes("forward") ? "forward" : zc.stages[zc.stages.length - 1]);
  },

  async open(stage) {
    const graph = (await zc.graphs())[stage];
    this.stage = stage; this.data = graph;
    this.unfolded ??= {};
    this.unfolded[stage] ??= new Set([0]);
    zc.choice(document.getElementById("graph-stages"), zc.stages, stage, (name) => this.open(name));
    this.lay();
    this.fit();
  },

  // -- boxes: {item, x, y, w, h, label, kind}; an item is a row, or -module -------------------------------------------------------

  label(item) {
    const { rows, modules } = this.data;
    if (item >= 0) {
      const name = rows.name[item], module = rows.module[item];
      return module && name.startsWith(`${module}.`) ? name.slice(module.length + 1) : name;
    }
    const { path, parent, rows: count } = modules[-item], outer = modules[parent].path;
    return `${outer ? path.slice(outer.length + 1) : path}  (${count})`;
  },

  size(item) {
    if (item >= 0 || !this.isOpen(item)) return { w: 0.62 * this.label(item).length + 2, h: 1.5 };
    return this.inside(-item);
  },

  isOpen(item) { return item < 0 && this.unfolded[this.stage].has(-item); },

  // The lines of an open module: each layer, broken where it is long.
  inside(module) {
    const lines = [];
    let w = module ? 0.62 * this.label(-module).length + 2 : 0, h = this.HEAD;
    for (const layer of this.data.modules[module].layers) {
      let line = null;
      for (const item of layer) {
        const size = this.size(item);
        if (!line || line.w + size.w > this.WRAP) lines.push(line = { items: [], w: 0, h: 0 });
        line.items.push([item, size]); line.w += size.w + this.GAP; line.h = Math.max(line.h, size.h);
      }
    }
    for (const line of lines) { w = Math.max(w, line.w + this.GAP); h += line.h + this.GAP; }
    const found = { w, h: h + 0.2, lines };
    return found;
  },

  lay() {
    this.boxes = []; this.frames = []; this.place = new Map();
    const put = (module, x, y, inside) => {
      let below = y + (module ? this.HEAD : 0);
      for (const line of inside.lines) {
        let left = x + (inside.w - line.w + this.GAP) / 2;
        for (const [item, size] of line.items) {
          const box = { item, x: left, y: below, w: size.w, h: size.h };
          this.place.set(item, box);
          if (size.lines) { this.frames.push(box); put(-item, left, below, size); } else this.boxes.push(box);
          left += size.w + this.GAP;
        }
        below += line.h + this.GAP;
      }
    };
    const all = this.inside(0);
    put(0, 0, 0, all);
    this.extent = [all.w, all.h];
    this.edges();
    this.draw();
  },

  // Where a row is seen: itself, or the folded module that holds it.
  visible(row) {
    if (this.seen.has(row)) return this.seen.get(row);
    let found = row;
    const { modules } = this.data;
    if (!this.place.has(row)) {
      let module = this.moduleOf[row];
      while (module > 0 && !this.place.has(-module)) module = modules[module].parent;
      found = -module;
    }
    this.seen.set(row, found);
    return found;
  },

  edges() {
    const { rows, modules } = this.data;
    if (this.moduleFor !== this.data) {
      this.moduleFor = this.data;
      const number = new Map(modules.map((module, i) => [module.path, i]));
      this.moduleOf = rows.module.map((path, row) => number.get(rows.kind[row] === "input" ? "inputs" : path));
    }
    this.seen = new Map();
    const found = new Map();
    rows.inputs.forEach((inputs, row) => {
      for (const source of inputs) {
        const a = this.visible(source), b = this.visible(row);
        if (a !== b) found.set(`${a} ${b}`, [a, b]);
      }
    });
    this.links = [...found.values()];
  },

  curve([a, b]) {
    const from = this.place.get(a), to = this.place.get(b);
    const x0 = from.x + from.w / 2, y0 = from.y + from.h, x1 = to.x + to.w / 2, y1 = to.y, bend = Math.max(0.8, Math.min(6, Math.abs(y1 - y0) / 2));
    return [x0, y0, x1, y1, x0, y0 + bend, x1, y1 - bend];
  },

  curves(links) {
    const data = { x0: [], y0: [], x1: [], y1: [], cx0: [], cy0: [], cx1: [], cy1: [] }, keys = Object.keys(data);
    for (const link of links) this.curve(link).forEach((value, i) => data[keys[i]].push(value));
    return data;
  },

  // -- drawing -----------------------------------------------------------------------------------------------------------------

  kind(item) { return item >= 0 ? this.data.rows.kind[item] : "module"; },

  quads(boxes, fill, edge) {
    return {
      left: boxes.map((b) => b.x), right: boxes.map((b) => b.x + b.w), top: boxes.map((b) => b.y), bottom: boxes.map((b) => b.y + b.h),
      fill: boxes.map(fill), edge: boxes.map(edge), index: boxes.map((b) => b.item),
    };
  },

  draw() {
    const line = zc.colour("dim"), plain = zc.colour("page"), soft = zc.colour("line");
    const colours = {};
    const fill = (box) => (colours[this.kind(box.item)] ??= zc.colour(this.kind(box.item)));
    this.source("modules").data = this.quads(this.frames, () => plain, () => soft);
    this.source("boxes").data = this.quads(this.boxes, fill, (box) => (box.item < 0 ? line : soft));
    this.source("edges").data = this.links.length <= 8000 ? this.curves(this.links) : this.curves([]);
    this.scale();
    this.light(zc.selection);
  },

  // Labels are as large as the boxes that they stand in, and only where they can be read.
  scale() {
    if (!this.data || this.scaling) return;
    this.scaling = true;
    requestAnimationFrame(() => {
      this.scaling = false;
      const { x_range, y_range } = this.plot, pixels = (this.plot.inner_height || 600) / Math.abs(y_range.end - y_range.start);
      const size = Math.min(15, 0.62 * pixels), near = size >= 5;
      const [top, bottom] = [Math.min(y_range.start, y_range.end), Math.max(y_range.start, y_range.end)];
      const [left, right] = [x_range.start, x_range.end];
      const inView = (b) => b.x + b.w > left && b.x < right && b.y + b.h > top && b.y < bottom;
      const boxes = near ? this.boxes.filter(inView) : [], frames = near ? this.frames.filter(inView) : [];
      const text = zc.colour("text");
      this.plot.renderers.find((each) => each.name === "labels").glyph.setv({ text_font_size: { value: `${size.toFixed(1)}px` } });
      this.source("labels").data = {
        x: [...boxes, ...frames].map((b) => b.x + b.w / 2),
        y: [...boxes.map((b) => b.y + b.h / 2), ...frames.map((b) => b.y + this.HEAD / 2)],
        text: [...boxes, ...frames].map((b) => this.label(b.item)),
        color: [...boxes, ...frames].map(() => text),
      };
    });
  },

  fit() { this.look(0, this.extent[0], 0, this.extent[1]); },

  // Show an area, not larger than it can be read if that is possible; the top of it, if it is much higher than wide.
  look(x0, x1, y0, y1) {
    const width = this.plot.inner_width || 900, height = this.plot.inner_height || 600;
    let unit = Math.min(width / (x1 - x0 + 2), height / (y1 - y0 + 2));
    let bottom = null;
    if (unit < 9) { unit = Math.min(18, Math.max(9, width / (x1 - x0 + 2))); bottom = y0 - 1 + height / unit; }
    unit = Math.min(unit, 24);
    const middle = (x0 + x1) / 2, centre = (y0 + y1) / 2;
    this.plot.x_range.setv({ start: middle - width / unit / 2, end: middle + width / unit / 2 });
    const [from, to] = bottom === null ? [centre - height / unit / 2, centre + height / unit / 2] : [y0 - 1, bottom];
    this.plot.y_range.setv({ start: to, end: from });
  },

  toggle(module) {
    const open = this.unfolded[this.stage], before = this.place.get(-module);
    if (open.has(module)) open.delete(module); else open.add(module);
    this.lay();
    const after = this.place.get(-module), { x_range, y_range } = this.plot;
    if (before && after) { // what was clicked stays where it is
      const dx = after.x + after.w / 2 - before.x - before.w / 2, dy = after.y - before.y;
      x_range.setv({ start: x_range.start + dx, end: x_range.end + dx });
      y_range.setv({ start: y_range.start + dy, end: y_range.end + dy });
    }
  },

  foldAll() { this.unfolded[this.stage] = new Set([0]); this.lay(); this.fit(); },

  unfoldLevel() {
    const open = this.unfolded[this.stage];
    const shut = this.boxes.filter((box) => box.item < 0).map((box) => -box.item).filter((module) => this.data.modules[module].path !== "inputs");
    for (const module of shut) open.add(module);
    this.lay(); this.fit();
  },

  // -- selections ---------------------------------------------------------------------------------------------------------------

  items(selection) {
    const found = new Set();
    if (!selection || !this.data) return found;
    const row = (number) => { if (number >= 0) found.add(this.visible(number)); };
    const hop = (number) => {
      const each = zc.step.hops[number];
      if (each.phase === this.stage) { row(each.launch); row(each.wait); for (const user of this.data.rows.users[each.launch] ?? []) row(user); }
      if (each.phase === "refresh" && this.stage === each.waiting) row(each.wait);
    };
    if (selection.phase === this.stage && selection.row !== undefined) row(selection.row);
    if (selection.hop !== undefined) hop(selection.hop);
    if (selection.parameter !== undefined) zc.step.parameters[selection.parameter].hops.forEach(hop);
    if (selection.module !== undefined) {
      const number = this.data.modules.findIndex((module) => module.path === selection.module);
      let module = number;
      while (module > 0 && !this.place.has(-module)) module = this.data.modules[module].parent;
      if (module > 0) found.add(-module);
    }
    return found;
  },

  light(selection) {
    if (!this.data) return;
    const items = this.items(selection), edge = zc.colour("lit"), boxes = [...items].map((item) => this.place.get(item)).filter(Boolean);
    this.source("lit").data = this.quads(boxes, () => null, () => edge);
    const end = this.data.rows.kind.indexOf("output"); // it reads too much to say anything
    const links = items.size ? this.links.filter(([a, b]) => (items.has(a) || items.has(b)) && b !== end).slice(0, 2000) : [];
    const accent = zc.colour("accent");
    this.source("lit-edges").data = { ...this.curves(links), color: links.map(() => accent) };
  },

  // Unfold what holds a selection, and show it.
  async reveal(selection) {
    const phase = selection.phase ?? (selection.hop !== undefined ? zc.step.hops[selection.hop].waiting : undefined);
    if (phase && phase !== this.stage && zc.stages.includes(phase)) await this.open(phase);
    const { modules } = this.data, open = this.unfolded[this.stage];
    let module = -1;
    if (selection.module !== undefined) module = modules[Math.max(0, modules.findIndex((each) => each.path === selection.module))].parent;
    const row = selection.row ?? (selection.hop !== undefined ? zc.step.hops[selection.hop].launch : -1);
    if (row >= 0) module = this.moduleOf[row];
    for (; module > 0; module = modules[module].parent) open.add(module);
    this.lay();
    const boxes = [...this.items(selection)].map((item) => this.place.get(item)).filter(Boolean);
    if (boxes.length) {
      const x = boxes[0].x + boxes[0].w / 2, y = boxes[0].y + boxes[0].h / 2;
      this.look(x - 30, x + 30, y - 12, y + 12);
    }
  },

  under(x, y) {
    const hit = (b) => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h;
    return this.boxes.find(hit) ?? this.frames.filter((b) => hit(b) && y <= b.y + this.HEAD).pop();
  },

  selectionOf(item) {
    if (item < 0) return { module: this.data.modules[-item].path };
    const hops = zc.hopOfRow.get(`${this.stage} ${item}`);
    return hops !== undefined ? { hop: hops, phase: this.stage, row: item } : { phase: this.stage, row: item };
  },
};

zc.hoverBox = (data) => {
  const source = data.renderer.data_source, indices = data.index.indices;
  if (data.renderer.name === "modules") return;
  zc.hover(indices.length ? zc.graph.selectionOf(source.data.index[indices[0]]) : null);
};
zc.tapBox = (event) => {
  const box = zc.graph.under(event.x, event.y);
  if (!box) { zc.hold(null); return; }
  if (box.item < 0) zc.graph.toggle(-box.item); else zc.hold(zc.graph.selectionOf(box.item));
};
