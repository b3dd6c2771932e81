"use strict";
// The panel that says what is under the pointer, and the tables: what waits and why, parameters, levels.
zc.detail = {
  place: document.getElementById("detail"),

  put(title, under, ...rest) { this.place.replaceChildren(zc.make("h2", title), zc.make("div", under, "dim"), ...rest); },

  facts(pairs) {
    const list = zc.make("dl");
    for (const [key, value] of pairs) if (value !== "" && value !== undefined) list.append(zc.make("dt", key), zc.make("dd", String(value)));
    return list;
  },

  link(text, selection) {
    const made = zc.make("a", text);
    made.onclick = () => { zc.hold(selection); zc.reveal(selection); };
    return made;
  },

  links(title, pairs, most = 12) {
    if (!pairs.length) return [];
    const list = zc.make("ul", "", "", pairs.slice(0, most).map(([text, selection]) => zc.make("li", "", "", [this.link(text, selection)])));
    if (pairs.length > most) list.append(zc.make("li", `and ${pairs.length - most} more`, "dim"));
    return [zc.make("h3", title), list];
  },

  show(selection) {
    if (!selection) return this.welcome();
    if (selection.hop !== undefined) return this.hop(selection.hop);
    if (selection.parameter !== undefined) return this.parameter(selection.parameter);
    if (selection.module !== undefined) return this.module(selection.module);
    return this.row(selection.phase, selection.row);
  },

  welcome() {
    const { step } = zc;
    this.put("This step", step.title, this.facts([["topology", step.topology], ["computed on", step.device]]),
      zc.make("pre", step.plan.join("\n")),
      zc.make("p", "Times are what the machine's data let expect of the scheduled program, not measurements. Point at a block to see what it is, what it carries and who needs it.", "dim"));
  },

  code(rows, row) {
    if (!rows || row < 0 || !rows.source[row]) return [];
    return [zc.make("h3", rows.source[row]), ...(rows.code[row] ? [zc.make("pre", rows.code[row])] : [])];
  },

  hop(number) {
    const hop = zc.step.hops[number], rows = zc.loaded?.[hop.phase]?.rows;
    const why = hop.reason ? [zc.make("h3", "why it is not hidden"), zc.make("div", `${hop.reason}: ${zc.head.reasons[hop.reason] ?? ""}`),
      ...(hop.cause ? [zc.make("div", `behind ${hop.cause}`, "dim")] : [])] : [];
    const users = (rows && hop.launch >= 0 ? rows.users[hop.launch] : []).map((row) => [rows.name[row], { phase: hop.phase, row }]);
    const ends = [];
    if (hop.launch >= 0) ends.push([`launch: line ${hop.launch} of ${hop.phase}`, { phase: hop.phase, row: hop.launch, hop: number }]);
    if (hop.wait >= 0) ends.push([`wait: line ${hop.wait} of ${hop.waiting}`, { phase: hop.waiting, row: hop.wait }]);
    this.put(`${hop.transfer} over ${hop.level}`, hop.phase, this.facts([
      ["bytes", zc.bytes(hop.bytes)], ["format", hop.wire], ["on the links", zc.seconds(hop.end - hop.begin)], ["launched at", zc.seconds(hop.launched)],
      ["arrives at", zc.seconds(hop.end)], ["waited for", hop.exposed ? zc.seconds(hop.exposed) : "no: hidden"], ["name", hop.name],
    ]), ...why,
    ...this.links("parameters", hop.parameters.map((name) => [name, { parameter: zc.parameterOf.get(name) }])),
    ...this.links("launch and wait", ends), ...this.links(hop.transfer === "gather" ? "read by" : "made by", users), ...this.code(rows, hop.launch));
  },

  row(phase, row) {
    const graph = zc.loaded?.[phase], rows = graph?.rows;
    if (!rows || row < 0) return this.put(phase || "step", "");
    const { spans: times, ofRow, mode } = zc.timeline, spans = (ofRow.get(`${phase} ${row}`) ?? []).map((i) => times.end[i] - times.begin[i]);
    const all = (zc.hopsOfUser.get(`${phase} ${row}`) ?? []).map((hop) => [this.hopName(hop), { hop }]);
    const [needs, feeds] = [true, false].map((gather) => all.filter(([, { hop }]) => (zc.step.hops[hop].transfer === "gather") === gather));
    this.put(rows.name[row], `${phase}, line ${row}`, this.facts([
      ["value", rows.value[row]], [mode === "measured" ? "took" : "takes", spans.length ? zc.seconds(spans.reduce((a, b) => a + b)) : ""], ["module", rows.module[row]],
    ]), zc.make("pre", rows.what[row]),
    ...this.links("needs", needs), ...this.links("feeds", feeds),
    ...this.links("reads", rows.inputs[row].map((each) => [rows.name[each], { phase, row: each }])),
    ...this.links("parameters", rows.parameters[row].map((name) => [name, { parameter: zc.parameterOf.get(name) }])),
    ...this.code(rows, row));
  },

  hopName(number) {
    const hop = zc.step.hops[number], names = hop.parameters;
    return `${hop.transfer} ${hop.level} ${names[0]}${names.length > 1 ? ` and ${names.length - 1} more` : ""}`;
  },

  parameter(number) {
    const row = zc.step.parameters[number], lines = [];
    for (const [transfer, by] of Object.entries(row.bytes)) for (const [level, count] of Object.entries(by)) lines.push([`${transfer}, ${level}`, zc.bytes(count)]);
    this.put(row.name, `${row.shape.join(" x ") || "scalar"}  ${row.compute}`, this.facts([
      ["weights over", row.weights], ["gradients over", row.gradients], ["optimizer over", row.optimizer], ["in backward", row.backward],
      ["waited for", row.exposed ? zc.seconds(row.exposed) : "-"], ["mostly", row.reason],
    ]), zc.make("h3", "bytes that one rank receives"), this.facts(lines), ...this.links("hops", row.hops.map((hop) => [`${zc.step.hops[hop].phase}: ${this.hopName(hop)}`, { hop }]), 30));
  },

  module(path) {
    const inside = zc.step.parameters.map((row, number) => [row, number]).filter(([row]) => row.name.startsWith(`${path}.`));
    this.put(path, "module", ...this.links(`${inside.length} parameters`, inside.map(([row, parameter]) => [row.name, { parameter }]), 24));
  },

  memory(number, at) {
    const owners = zc.timeline.OWNERS, { owners: data } = zc.step;
    const total = owners.reduce((sum, owner) => sum + data[owner][number], 0);
    this.put(`${zc.bytes(total)} in memory`, `at ${zc.seconds(at)}`, this.facts(owners.map((owner) => [owner, zc.bytes(data[owner][number])])));
  },
};

zc.tables = {
  start() {
    const { step } = zc, waiting = step.hops.map((hop, number) => ({ ...hop, number })).filter((hop) => hop.exposed > 0);
    const total = waiting.reduce((sum, hop) => sum + hop.exposed, 0);
    this.table("why-table", `${waiting.length} hops that were not hidden, ${zc.seconds(total)} together`, [
      ["hop", (hop) => zc.detail.hopName(hop.number), "name"], ["phase", (hop) => hop.phase, "left"], ["level", (hop) => hop.level, "left"],
      ["format", (hop) => hop.wire, "left"], ["bytes", (hop) => zc.bytes(hop.bytes), "", (hop) => hop.bytes],
      ["waited for", (hop) => zc.seconds(hop.exposed), "", (hop) => hop.exposed], ["hidden", (hop) => zc.seconds(hop.hidden), "", (hop) => hop.hidden],
      ["why", (hop) => hop.reason, "left"], ["where", (hop) => hop.source, "left"],
    ], waiting, 5, (hop) => ({ hop: hop.number }));
    const levels = step.levels.map((level) => level.level);
    const received = (row, level) => Object.values(row.bytes).reduce((sum, by) => sum + (by[level] ?? 0), 0);
    this.table("parameters-table", `${step.parameters.length} parameters; bytes are what one rank receives in a step`, [
      ["parameter", (row) => row.name, "name"], ["shape", (row) => row.shape.join(" x ") || "scalar", "", (row) => row.elements],
      ["weights", (row) => row.weights, "left"], ["gradients", (row) => row.gradients, "left"], ["optimizer", (row) => row.optimizer, "left"],
      ["in backward", (row) => row.backward, "left"],
      ...levels.map((level) => [level, (row) => (received(row, level) ? zc.bytes(received(row, level)) : "-"), "", (row) => received(row, level)]),
      ["waited for", (row) => (row.exposed ? zc.seconds(row.exposed) : "-"), "", (row) => row.exposed], ["why", (row) => row.reason, "left"],
    ], step.parameters.map((row, number) => ({ ...row, number })), 6 + levels.length, (row) => ({ parameter: row.number }));
  },

  // Columns are [heading, text of a row, class, what to sort by].
  table(place, title, columns, rows, sorted, selectionOf, down = true) {
    const key = columns[sorted][3] ?? columns[sorted][1], sign = down ? -1 : 1;
    const ordered = [...rows].sort((a, b) => { const [x, y] = [key(a), key(b)]; return sign * (x < y ? -1 : x > y ? 1 : 0); });
    const head = zc.make("tr", "", "", columns.map(([name, , kind], number) => {
      const cell = zc.make("th", name + (number === sorted ? (down ? " \u2193" : " \u2191") : ""), kind === "name" || kind === "left" ? "left" : "");
      cell.onclick = () => this.table(place, title, columns, rows, number, selectionOf, number === sorted ? !down : true);
      return cell;
    }));
    const body = ordered.map((row) => {
      const line = zc.make("tr", "", "", columns.map(([, text, kind]) => zc.make("td", text(row), kind)));
      line.onclick = () => {
        document.querySelectorAll(`#${place} .lit`).forEach((each) => each.classList.remove("lit"));
        line.classList.add("lit"); zc.hold(selectionOf(row));
      };
      return line;
    });
    const made = zc.make("table", "", "", [zc.make("thead", "", "", [head]), zc.make("tbody", "", "", body)]);
    document.getElementById(place).replaceChildren(zc.make("h2", title), made);
  },
};
