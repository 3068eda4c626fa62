"use strict";
(() => {
  const cells = JSON.parse(document.getElementById("data").textContent).cells;
  const el = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, text) => {
    const svg = ["circle", "path", "line", "text", "g", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const family = (c) => c.defense.split("+").map((part) => part.split(":")[0]).join("+");
  const number = (x) => (x === null || x === undefined ? "–" : Math.abs(x) >= 100 ? x.toFixed(0) : String(+x.toPrecision(3)));
  const interval = (e) => (e === null ? "–" : number(e[0]) + (e[1] === null ? "" : ` [${number(e[1])}, ${number(e[2])}]`));
  const name = (c) => (c.defense === "none" ? "no defense" : c.defense);
  const say = (c) => `${name(c)}, ${c.attack}, seed ${c.seed}: test AUC ${interval(c.utility)}, ${c.measure || "no leakage measured"} ${c.leakage ? interval(c.leakage) : ""}`;

  const axes = { dataset: (c) => c.dataset, model: (c) => c.model, measure: (c) => c.measure, attack: (c) => c.attack, defense: family, seed: (c) => String(c.seed) };
  const chosen = {};
  const drawn = cells.filter((c) => c.leakage !== null && c.utility !== null);
  for (const [key, value] of Object.entries(axes)) {
    const found = [...new Set((key === "measure" ? drawn : cells).map(value))];
    const label = make("label", {}, key);
    const select = make("select", { name: key, "aria-label": `Filter by ${key}` });
    if (key !== "measure") select.append(make("option", { value: "" }, `all (${found.length})`));
    for (const text of found) select.append(make("option", { value: text }, text));
    chosen[key] = key === "measure" ? (found[0] ?? "") : "";
    select.addEventListener("change", () => { chosen[key] = select.value; show(); });
    label.append(select);
    el("filters").append(label);
  }
  el("filters").addEventListener("submit", (event) => event.preventDefault());

  const families = [...new Set(cells.map(family))];
  const colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"];
  const shapes = [
    (x, y) => `M${x - 5},${y - 5}h10v10h-10z`, (x, y) => `M${x},${y - 6}l6,11h-12z`,
    (x, y) => `M${x},${y - 6.5}l6.5,6.5l-6.5,6.5l-6.5,-6.5z`, (x, y) => `M${x},${y + 6}l6,-11h-12z`,
    (x, y) => `M${x - 2},${y - 6}h4v4h4v4h-4v4h-4v-4h-4v-4h4z`,
    (x, y) => `M${x - 5.5},${y}a5.5,5.5 0 1 0 11,0a5.5,5.5 0 1 0 -11,0z`,
  ];
  const scale = (low, high, from, to) => (x) => (high === low ? (from + to) / 2 : from + ((x - low) / (high - low)) * (to - from));
  const ticks = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let x = Math.ceil(low / step) * step; x <= high + 1e-9; x += step) found.push(+x.toPrecision(10));
    return found;
  };

  function detail(c) {
    const list = make("dl");
    const lines = [["defense", name(c)], ["attack", c.attack], ["data", `${c.dataset}, ${c.model}`], ["seed", c.seed], ["test AUC", interval(c.utility)],
      ["worst site", interval(c.worst)], [c.measure || "leakage or damage", c.leakage ? interval(c.leakage) : "–"], ...c.baselines, ["ε", number(c.epsilon)],
      ["training", `${number(c.seconds)} s`], ["cell", c.id], ["run", c.run]];
    for (const [key, value] of lines) {
      const row = make("div");
      row.append(make("dt", {}, key), make("dd", {}, typeof value === "number" && key !== "seed" ? number(value) : value));
      list.append(row);
    }
    el("detail").replaceChildren(list, make("code", { class: "command" }, c.command));
  }

  function plot(rows) {
    const svg = el("plot"), box = { left: 58, right: 500, top: 16, bottom: 356 };
    svg.replaceChildren();
    if (!rows.length) { svg.append(make("text", { x: 60, y: 60 }, "No cell with this filter has a leakage and a utility.")); return; }
    const barred = rows.length <= 150, ends = (e) => (barred ? e.filter((x) => x !== null) : [e[0]]);
    const xs = rows.flatMap((c) => [...ends(c.leakage), ...c.baselines.map((b) => b[1])]), ys = rows.flatMap((c) => ends(c.utility));
    const range = (values) => { const low = Math.min(...values), high = Math.max(...values), pad = 0.08 * (high - low) || 0.05 * Math.abs(high) || 0.1; return [low - pad, high + pad]; };
    const [x0, x1] = range(xs), [y0, y1] = range(ys);
    const sx = scale(x0, x1, box.left, box.right), sy = scale(y0, y1, box.bottom, box.top);
    for (const x of ticks(x0, x1)) svg.append(make("line", { class: "grid", x1: sx(x), x2: sx(x), y1: box.top, y2: box.bottom }), make("text", { x: sx(x), y: box.bottom + 16, "text-anchor": "middle" }, number(x)));
    for (const y of ticks(y0, y1)) svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(y), y2: sy(y) }), make("text", { x: box.left - 6, y: sy(y) + 4, "text-anchor": "end" }, number(y)));
    svg.append(make("text", { x: (box.left + box.right) / 2, y: 392, "text-anchor": "middle" }, rows[0].measure), make("text", { x: 14, y: 186, "text-anchor": "middle", transform: "rotate(-90 14 186)" }, "test AUC"));
    const bases = new Map(rows.flatMap((c) => c.baselines).map((b) => [b[0], b[1]]));
    for (const [title, value] of bases) svg.append(make("line", { class: "base", x1: sx(value), x2: sx(value), y1: box.top, y2: box.bottom }), make("text", { x: sx(value) + 3, y: box.top + 10 }, title));
    const bars = make("g", { "aria-hidden": "true" });
    svg.append(bars);
    for (const c of rows) {
      const x = sx(c.leakage[0]), y = sy(c.utility[0]), k = families.indexOf(family(c));
      if (barred) {
        if (c.leakage[1] !== null) bars.append(make("line", { class: "bar", x1: sx(c.leakage[1]), x2: sx(c.leakage[2]), y1: y, y2: y }));
        if (c.utility[1] !== null) bars.append(make("line", { class: "bar", x1: x, x2: x, y1: sy(c.utility[1]), y2: sy(c.utility[2]) }));
      }
      const point = make("path", { class: "point", d: shapes[k % shapes.length](x, y), fill: colours[k % colours.length], tabindex: 0, role: "img", "aria-label": say(c), "data-id": c.id });
      point.append(make("title", {}, say(c)));
      point.addEventListener("mouseenter", () => detail(c));
      point.addEventListener("focus", () => detail(c));
      svg.append(point);
    }
    [...new Set(rows.map(family))].forEach((title, row) => {
      const k = families.indexOf(title), y = 24 + 18 * row;
      svg.append(make("path", { d: shapes[k % shapes.length](518, y - 4), fill: colours[k % colours.length] }), make("text", { x: 530, y }, title === "none" ? "no defense" : title));
    });
  }

  const columns = [["cell", (c) => c.id], ["data", (c) => c.dataset], ["model", (c) => c.model], ["attack", (c) => c.attack], ["defense", name], ["seed", (c) => c.seed],
    ["test AUC", (c) => interval(c.utility), (c) => c.utility?.[0]], ["leakage or damage", (c) => (c.leakage ? interval(c.leakage) : "–"), (c) => c.leakage?.[0]], ["measure", (c) => c.measure], ["ε", (c) => number(c.epsilon), (c) => c.epsilon]];
  function table(rows) {
    const body = document.createDocumentFragment();
    for (const c of rows) {
      const line = make("tr", { "data-id": c.id });
      for (const [, text, value] of columns) {
        const exact = value && value(c);
        line.append(make("td", exact === null || exact === undefined ? {} : { class: "n", "data-value": exact }, text(c)));
      }
      const command = make("td");
      command.append(make("code", {}, c.command));
      line.append(command);
      body.append(line);
    }
    el("cell-table").tBodies[0].replaceChildren(body);
  }
  const head = make("tr");
  for (const [title] of [...columns, ["command"]]) head.append(make("th", { scope: "col" }, title));
  el("cell-table").tHead.append(head);

  function show() {
    const fits = (c, keys) => keys.every((key) => !chosen[key] || axes[key](c) === chosen[key]);
    const keys = Object.keys(axes).filter((key) => key !== "measure");
    const rows = cells.filter((c) => fits(c, keys)), points = drawn.filter((c) => fits(c, Object.keys(axes)));
    el("shown").textContent = `${rows.length} of ${cells.length} cells, ${points.length} of them drawn.`;
    plot(points);
    table(rows);
  }
  addEventListener("beforeprint", () => { for (const node of document.querySelectorAll("details")) node.open = true; });
  show();
})();
