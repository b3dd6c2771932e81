"use strict";
// The program after each pass, or what each pass changed. Lines stand in blocks that the browser draws only where they are seen.
zc.programs = {
  BLOCK: 100,
  mode: "program",

  async start() {
    document.getElementById("filter").oninput = () => this.show();
    await this.open(zc.stages[0]);
  },

  async open(stage) {
    this.stage = stage;
    this.graph = (await zc.graphs())[stage];
    this.pass = this.graph.programs.length - 1;
    zc.choice(document.getElementById("program-stages"), zc.stages, stage, (name) => this.open(name));
    this.list();
    this.show();
  },

  list() {
    document.getElementById("passes").replaceChildren(...this.graph.programs.map((program, number) => {
      const sign = (mark) => program.changes.reduce((sum, line) => sum + this.graph.table[line].startsWith(mark), 0);
      const title = zc.make("div", "", "", [zc.make("b", program.name === "input" ? "before the passes" : program.name)]);
      const notes = [...program.notes];
      if (program.name !== "input") notes.push(program.changes.length ? `${sign("-")} lines out, ${sign("+")} in` : "changes nothing");
      if (program.seconds) notes.push(`took ${zc.seconds(program.seconds)}`);
      const item = zc.make("li", "", number === this.pass ? "on" : "", [title, ...notes.map((note) => zc.make("div", note, "notes"))]);
      item.dataset.pass = program.name;
      item.onclick = () => { this.pass = number; this.list(); this.show(); };
      return item;
    }));
    zc.choice(document.getElementById("program-modes"), ["program", "changes"], this.mode, (mode) => { this.mode = mode; this.list(); this.show(); });
  },

  show() {
    const program = this.graph.programs[this.pass], wanted = document.getElementById("filter").value.toLowerCase();
    const changes = this.mode === "changes", numbers = changes ? program.changes : program.lines;
    const before = new Set(this.pass && !changes ? this.graph.programs[this.pass - 1].lines : []);
    const found = [];
    numbers.forEach((line, number) => {
      const text = this.graph.table[line];
      if (!wanted || text.toLowerCase().includes(wanted)) found.push(this.line(text, number, changes, this.pass > 0 && !changes && !before.has(line)));
    });
    const blocks = [];
    for (let start = 0; start < found.length; start += this.BLOCK) {
      const block = zc.make("div", "", "block", found.slice(start, start + this.BLOCK));
      block.style.containIntrinsicSize = `auto ${18 * Math.min(this.BLOCK, found.length - start)}px`;
      blocks.push(block);
    }
    const place = document.getElementById("program");
    place.replaceChildren(...(blocks.length ? blocks : [zc.make("div", changes ? "this pass changes nothing" : "no line", "ln dim")]));
    place.scrollTop = 0;
    document.getElementById("program-count").textContent = `${found.length} of ${numbers.length} lines`;
    this.light(zc.selection);
  },

  line(text, number, changes, isNew) {
    const mark = changes ? text[0] : "";
    const kind = changes ? { "+": "ln add", "-": "ln del", "@": "ln hunk" }[mark] ?? "ln" : isNew ? "ln add" : "ln";
    const made = zc.make("div", "", kind, [zc.make("span", changes ? "" : String(number), "n")]);
    const hop = /^(.* = )((?:gather|reduce|sync|back)[<>])(.*)$/.exec(text);
    made.append(...(hop ? [hop[1], zc.make("span", hop[2], "hop"), hop[3]] : [text]));
    const name = text.slice(changes ? 1 : 0).split("  ")[0].trim();
    made.dataset.name = name;
    made.onclick = () => {
      const row = this.graph.at.get(name);
      if (row === undefined) return;
      const hop = zc.hopOfRow.get(`${this.stage} ${row}`);
      zc.hold(hop !== undefined ? { hop, phase: this.stage, row } : { phase: this.stage, row });
    };
    return made;
  },

  names(selection) {
    const found = new Set(), rows = this.graph?.rows;
    if (!selection || !rows) return found;
    const add = (row) => { if (row >= 0) found.add(rows.name[row]); };
    const hop = (number) => {
      const each = zc.step.hops[number];
      if (each.phase === this.stage) { add(each.launch); add(each.wait); }
      if (each.phase === "refresh" && this.stage === each.waiting) add(each.wait);
    };
    if (selection.phase === this.stage && selection.row !== undefined) add(selection.row);
    if (selection.hop !== undefined) hop(selection.hop);
    if (selection.parameter !== undefined) zc.step.parameters[selection.parameter].hops.forEach(hop);
    if (selection.module !== undefined) rows.module.forEach((path, row) => { if (path === selection.module) add(row); });
    return found;
  },

  light(selection) {
    const names = this.names(selection);
    for (const line of document.querySelectorAll("#program .lit")) line.classList.remove("lit");
    if (names.size) for (const line of document.querySelectorAll("#program .ln")) if (names.has(line.dataset.name)) line.classList.add("lit");
  },

  async reveal(selection) {
    const phase = selection.phase ?? (selection.hop !== undefined ? zc.step.hops[selection.hop].waiting : undefined);
    if (phase && phase !== this.stage && zc.stages.includes(phase)) await this.open(phase);
    this.light(selection);
    document.querySelector("#program .lit")?.scrollIntoView({ block: "center" });
  },
};
