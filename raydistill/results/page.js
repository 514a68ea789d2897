"use strict";
// The script of front.html. It loads nothing: all data are in the element #data.

const data = JSON.parse(document.getElementById("data").textContent);
const METHOD_COLOURS = { sft: "#0072B2", kd: "#D55E00", pl: "#009E73" }; // the Okabe-Ito palette
const OTHER_COLOUR = "#666";
const MARKER_RADIUS = 6;
const SAMPLES_PER_STEP = 20;

// ---------------------------------------------------------------------------------------------- elements and text

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svgElement(tag, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const colourOf = method => METHOD_COLOURS[method] || OTHER_COLOUR;
const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const short = value => String(Number(value.toPrecision(4)));

// ---------------------------------------------------------------------------------------------- tooltips and tables

const tooltip = document.getElementById("tooltip");

function addTooltip(marker, lines) {
  if (!marker) return; // a trial without a score has no marker
  marker.dataset.tooltip = "";
  marker.setAttribute("tabindex", "0");
  marker.setAttribute("role", "img");
  marker.setAttribute("aria-label", lines.join(", "));
  const show = () => {
    const bounds = marker.getBoundingClientRect();
    tooltip.textContent = lines.join("\n");
    tooltip.style.display = "block";
    tooltip.style.left = Math.max(4, Math.min(bounds.right + 8, innerWidth - tooltip.offsetWidth - 8)) + "px";
    tooltip.style.top = Math.max(4, Math.min(bounds.top, innerHeight - tooltip.offsetHeight - 8)) + "px";
  };
  const hide = () => (tooltip.style.display = "none");
  marker.addEventListener("mouseenter", show);
  marker.addEventListener("focus", show);
  marker.addEventListener("mouseleave", hide);
  marker.addEventListener("blur", hide);
}

/** The first number of a cell, and the text for cells without a number, which come last. */
function sortValue(cell) {
  const number = parseFloat(cell.textContent.replace(/,/g, ""));
  return Number.isNaN(number) ? [1, 0, cell.textContent] : [0, number, cell.textContent];
}

function sortTable(table, column) {
  const header = table.tHead.rows[0].cells[column];
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map(row => [sortValue(row.cells[column]), row]);
  rows.sort(([a], [b]) => a[0] - b[0] || (ascending ? 1 : -1) * (a[1] - b[1] || a[2].localeCompare(b[2])));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.firstElementChild.addEventListener("click", () => sortTable(table, column));
  });
}

// ---------------------------------------------------------------------------------------------- charts

/** About `count` round numbers that cover low to high. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * unit).find(size => size >= raw);
  const numbers = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) numbers.push(i * step);
  return numbers;
}

function paddedRange(values, share) {
  const low = Math.min(...values), high = Math.max(...values);
  const padding = share * (high - low) || Math.abs(high) * 0.1 || 1;
  return [low - padding, high + padding];
}

/**
 * Draw the axes of a chart as wide as its container, into a group in front of which the marks are drawn.
 * Returns the functions from values to pixels.
 */
function drawAxes(svg, { xs, ys, xLabel, yLabel, height, padding = 0.06 }) {
  const width = Math.max(240, svg.parentElement.clientWidth);
  const area = { left: 46, right: width - 10, top: 10, bottom: height - 40 };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.querySelector(":scope > .axes")?.remove();
  const group = svgElement("g", { class: "axes" }, svg);
  svg.prepend(group);
  const [x0, x1] = paddedRange(xs, padding), [y0, y1] = paddedRange(ys, padding);
  const x = value => area.left + ((value - x0) / (x1 - x0)) * (area.right - area.left);
  const y = value => area.bottom - ((value - y0) / (y1 - y0)) * (area.bottom - area.top);
  for (const value of ticks(x0, x1, Math.max(3, width / 110))) {
    svgElement("line", { x1: x(value), x2: x(value), y1: area.top, y2: area.bottom, class: "grid" }, group);
    svgElement("text", { x: x(value), y: area.bottom + 16, "text-anchor": "middle" }, group, short(value));
  }
  for (const value of ticks(y0, y1, 5)) {
    svgElement("line", { x1: area.left, x2: area.right, y1: y(value), y2: y(value), class: "grid" }, group);
    svgElement("text", { x: area.left - 6, y: y(value) + 4, "text-anchor": "end" }, group, short(value));
  }
  const middle = (area.left + area.right) / 2;
  svgElement("text", { x: middle, y: height - 6, "text-anchor": "middle" }, group, xLabel);
  const rotation = { transform: `translate(11 ${(area.top + area.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" };
  svgElement("text", rotation, group, yLabel);
  return { x, y, area, group };
}

const SHAPES = [
  r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  r => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  r => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  r => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
  r => `M0 ${1.2 * r}L${1.2 * r} ${-r}H${-1.2 * r}Z`,
  r => `M${-1.2 * r} 0L${r} ${-1.2 * r}V${1.2 * r}Z`,
  r => `M${1.2 * r} 0L${-r} ${-1.2 * r}V${1.2 * r}Z`,
];
const STAR = "M0-11L2.6-3.6L10.5-3.4L4.2 1.4L6.5 8.9L0 4.4L-6.5 8.9L-4.2 1.4L-10.5-3.4L-2.6-3.6Z";

// ---------------------------------------------------------------------------------------------- the choice

const asCost = (name, value) => (data.front.costs[name].is_lower_bound ? 1 / value : value);

function fits(candidate, bounds) {
  return Object.entries(bounds).every(
    ([name, bound]) => name in candidate.costs && asCost(name, candidate.costs[name]) / asCost(name, bound) <= 1
  );
}

/**
 * The rule of `raydistill.results.pareto.choose`: the cheapest candidate within the bounds that is not inferior to the
 * one with the highest score. The intervals of the differences were computed by raydistill.
 */
function choose(bounds, tolerance) {
  const cost = Object.keys(bounds)[0] || "latency_ms";
  const costOf = c => (cost in c.costs ? asCost(cost, c.costs[cost]) : Infinity);
  const byKey = (a, b) => (a.key < b.key ? -1 : 1);
  const difference = (a, b) => (a === b ? 0 : a - b); // of two infinite costs
  const within = data.front.candidates.filter(c => fits(c, bounds));
  if (!within.length) return { cost, best: null, highest: null, comparison: null };
  const ranked = [...within].sort((a, b) => b.score - a.score || difference(costOf(a), costOf(b)) || byKey(a, b));
  const highest = ranked[0];
  const comparisons = data.front.comparisons[highest.key] || {};
  const best = within
    .filter(c => costOf(c) < costOf(highest) && c.key in comparisons && comparisons[c.key][1] > -tolerance)
    .sort((a, b) => difference(costOf(a), costOf(b)) || b.score - a.score || byKey(a, b))[0];
  return { cost, best: best || highest, highest, comparison: best ? comparisons[best.key] : null };
}

function explain({ cost, best, highest, comparison }, tolerance) {
  if (!best) return "No student fits these bounds.";
  const top = `${highest.label} has the highest ${data.front.metric_name}, ${highest.score.toFixed(2)}, within the bounds`;
  if (!comparison) return `${top}; no student with a lower ${cost} is shown to be within the tolerance of ${tolerance} points.`;
  const [change, low, high] = comparison;
  const saving = Math.round(100 * Math.abs(best.costs[cost] / highest.costs[cost] - 1));
  const relation = best.costs[cost] > highest.costs[cost] ? "more" : "less";
  return (
    `${top}, but ${best.label} is not inferior with a tolerance of ${tolerance} points: ${signed(change)}, 95 % interval ` +
    `[${signed(low)}, ${signed(high)}] on the same rows, with ${saving} % ${relation} ${cost}.`
  );
}

// ---------------------------------------------------------------------------------------------- the front

const front = data.front && {
  svg: document.getElementById("front"),
  bounds: {},
  tolerance: data.front.tolerance,
  axis: data.front.cost,
  choice: null,
};

/** The candidates that no other dominates in score and cost, cheapest first. */
function paretoFront(cost) {
  const priced = data.front.candidates.filter(c => cost in c.costs);
  priced.sort((a, b) => asCost(cost, a.costs[cost]) - asCost(cost, b.costs[cost]) || b.score - a.score);
  return priced.filter((c, i) => priced.slice(0, i).every(other => other.score < c.score));
}

function drawFront() {
  const { svg, axis, bounds, choice } = front;
  const { markers, teacher, sizes } = data.front;
  const shown = markers.filter(m => axis in m.costs);
  const points = [...shown.map(m => [m.costs[axis], m.score])];
  const hasTeacher = teacher.score !== null && axis in teacher.costs;
  if (hasTeacher) points.push([teacher.costs[axis], teacher.score]);
  const ys = [...points.map(p => p[1]), ...shown.flatMap(m => m.interval || []), ...shown.flatMap(m => m.test ?? [])];
  const narrow = svg.parentElement.clientWidth < 600;
  const chart = drawAxes(svg, {
    xs: points.map(p => p[0]), ys, height: narrow ? 340 : 460,
    xLabel: data.front.costs[axis].label, yLabel: `${data.front.metric_name} on ${data.front.split}`,
  });
  drawFrontLines(chart, hasTeacher);
  const onFront = new Set(paretoFront(axis).map(c => c.key));
  const candidates = new Map(data.front.candidates.map(c => [c.key, c]));
  for (const marker of markers) {
    const group = document.getElementById(marker.id);
    group.replaceChildren();
    if (!(axis in marker.costs)) continue;
    const candidate = candidates.get(marker.key);
    group.classList.toggle("excluded", !candidate || !fits(candidate, bounds));
    group.setAttribute("transform", `translate(${chart.x(marker.costs[axis])} ${chart.y(marker.score)})`);
    drawMarker(group, marker, SHAPES[sizes.indexOf(marker.size) % SHAPES.length], chart, onFront.has(marker.key));
    if (choice.best?.key === marker.key) svgElement("circle", { r: 13, class: "ring" }, group);
  }
  if (hasTeacher) {
    const group = document.getElementById("teacher");
    group.replaceChildren();
    group.setAttribute("transform", `translate(${chart.x(teacher.costs[axis])} ${chart.y(teacher.score)})`);
    svgElement("path", { d: STAR }, group);
  }
}

function drawMarker(group, marker, shape, chart, isOnFront) {
  const colour = colourOf(marker.method);
  const y = value => chart.y(value) - chart.y(marker.score);
  if (marker.interval) {
    const [low, high] = marker.interval;
    svgElement("line", { x1: 0, x2: 0, y1: y(low), y2: y(high), stroke: colour, class: "interval" }, group);
  }
  if (marker.test !== null && (isOnFront || marker.budgets.length)) {
    svgElement("path", { d: shape(4), stroke: colour, class: "test", transform: `translate(0 ${y(marker.test)})` }, group);
  }
  svgElement("path", { d: shape(MARKER_RADIUS), stroke: colour, fill: isOnFront ? colour : "#fff", class: "mark" }, group);
  if (marker.budgets.length) {
    const flip = chart.x(marker.costs[front.axis]) > (chart.area.left + chart.area.right) / 2;
    const position = { x: flip ? -14 : 14, y: -10, "text-anchor": flip ? "end" : "start", class: "budget" };
    svgElement("text", position, group, marker.budgets.join(", "));
  }
}

function drawFrontLines({ x, y, area, group }, hasTeacher) {
  const { axis, bounds } = front;
  const line = paretoFront(axis).map(c => [x(c.costs[axis]), y(c.score)]);
  line.sort((a, b) => a[0] - b[0]);
  const isLower = data.front.costs[axis].is_lower_bound;
  const steps = line.map(([px, py], i) => (i === 0 ? `M${px} ${py}` : isLower ? `V${py}H${px}` : `H${px}V${py}`));
  svgElement("path", { d: steps.join("") || "M0 0", class: "front-line" }, group);
  if (hasTeacher) {
    const height = y(data.front.teacher.score);
    svgElement("line", { x1: area.left, x2: area.right, y1: height, y2: height, class: "teacher-line" }, group);
  }
  if (axis in bounds) {
    const position = Math.max(area.left, Math.min(area.right, x(bounds[axis])));
    svgElement("line", { x1: position, x2: position, y1: area.top, y2: area.bottom, class: "bound" }, group);
  }
}

// ---------------------------------------------------------------------------------------------- sliders

/** The values of a cost from the strictest to the loosest; the last position of the slider sets no bound. */
function sliderValues(name) {
  const values = data.front.candidates.filter(c => name in c.costs).map(c => c.costs[name]);
  return [...new Set(values)].sort((a, b) => asCost(name, a) - asCost(name, b));
}

function addSlider(container, name) {
  const values = sliderValues(name);
  const { label, is_lower_bound } = data.front.costs[name];
  const range = element("input", { type: "range", min: 0, max: values.length, id: `slider-${name}`, "aria-label": label });
  const number = element("input", { type: "number", step: "any", min: 0, placeholder: "none", "aria-label": label });
  number.id = `bound-${name}`;
  const caption = element("span", { class: "caption" }, `${label} ${is_lower_bound ? "≥" : "≤"}`);
  container.append(element("div", { class: "slider" }, caption, range, number));
  const set = bound => {
    if (bound === undefined) delete front.bounds[name];
    else front.bounds[name] = bound;
    update();
  };
  // The rounded number must admit the student that the slider stands for.
  const rounded = value => {
    const unit = 10 ** (Math.floor(Math.log10(value)) - 3);
    return Number(((is_lower_bound ? Math.floor : Math.ceil)(value / unit) * unit).toPrecision(4));
  };
  range.addEventListener("input", () => set(range.value < values.length ? rounded(values[range.value]) : undefined));
  number.addEventListener("input", () => set(number.value > 0 ? Number(number.value) : undefined));
  return () => {
    const bound = front.bounds[name];
    if (document.activeElement !== number) number.value = bound === undefined ? "" : short(bound);
    const admitted = values.filter(value => bound === undefined || asCost(name, value) <= asCost(name, bound));
    if (document.activeElement !== range) range.value = bound === undefined ? values.length : admitted.length - 1;
  };
}

let refreshSliders = [];

function update() {
  front.choice = choose(front.bounds, front.tolerance);
  for (const refresh of refreshSliders) refresh();
  drawFront();
  showChoice();
  if (front.choice.best) selectSystem(front.choice.best.key);
}

function showChoice() {
  const { best } = front.choice;
  const bounds = Object.entries(front.bounds);
  const card = document.getElementById("choice");
  const facts = element("dl");
  for (const [name, value] of best ? best.facts : []) facts.append(element("dt", {}, name), element("dd", {}, value));
  const options = bounds.map(([name, bound]) => `--within ${name}=${bound}`);
  const command = `raydistill choose ${data.front.name} ${options.join(" ")} --tolerance ${front.tolerance}`;
  card.replaceChildren(
    element("h3", {}, best ? best.label : "nothing fits"),
    facts,
    element("p", { class: "reason" }, explain(front.choice, front.tolerance)),
    ...(best && bounds.length ? [element("p", {}, "To export this student: ", element("code", {}, command))] : [])
  );
}

function setUpFront() {
  const sliders = document.getElementById("sliders");
  const costs = Object.keys(data.front.costs);
  for (const [id, lines] of Object.entries(data.tooltips)) addTooltip(document.getElementById(id), lines);
  refreshSliders = costs.filter(name => sliderValues(name).length > 1).map(name => addSlider(sliders, name));
  const axis = document.getElementById("axis");
  for (const name of costs) axis.append(element("option", { value: name }, data.front.costs[name].label));
  axis.value = front.axis;
  axis.addEventListener("change", () => { front.axis = axis.value; drawFront(); });
  const tolerance = document.getElementById("tolerance");
  tolerance.value = front.tolerance;
  tolerance.addEventListener("input", () => { front.tolerance = Math.max(0, Number(tolerance.value)); update(); });
  for (const button of document.querySelectorAll("[data-budget]")) {
    button.addEventListener("click", () => {
      front.bounds = { ...(data.front.budgets[button.dataset.budget] || {}) };
      document.activeElement.blur();
      update();
    });
  }
  front.bounds = { ...(Object.values(data.front.budgets)[0] || {}) };
  drawLegend();
  update();
}

function drawLegend() {
  const legend = document.getElementById("legend");
  const entry = (path, attributes, text) => {
    const svg = svgElement("svg", { width: 20, height: 16, viewBox: "-10 -8 20 16", "aria-hidden": "true" }, legend);
    svgElement("path", { d: path, ...attributes }, svg);
    legend.append(element("span", {}, text));
  };
  const methods = new Set(data.front.markers.map(m => m.method));
  for (const method of methods) entry(SHAPES[0](5), { fill: colourOf(method) }, method);
  data.front.sizes.forEach((size, i) => entry(SHAPES[i % SHAPES.length](5), { fill: "none", stroke: "#444" }, size || "full"));
  entry(STAR, { transform: "scale(.7)" }, "teacher");
  entry(SHAPES[0](5), { fill: "#444" }, "on the front");
  entry(SHAPES[0](3), { fill: "none", stroke: "#999" }, "test score");
}

// ---------------------------------------------------------------------------------------------- learning curves

function drawCurves() {
  const container = document.getElementById("curves");
  const measure = Number(document.getElementById("measure").value);
  container.replaceChildren();
  const points = curve => curve.points.filter(point => point[measure] !== null);
  const label = document.getElementById("measure").selectedOptions[0].textContent;
  for (const size of new Set(data.curves.map(curve => curve.size))) {
    const curves = data.curves.filter(curve => curve.size === size && points(curve).length);
    if (!curves.length) continue;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    container.append(element("figure", {}, element("figcaption", {}, size || "full"), svg));
    const all = curves.flatMap(points);
    const chart = drawAxes(svg, {
      xs: all.map(p => p[0]), ys: all.map(p => p[measure]), xLabel: "epoch", yLabel: label, height: 240,
    });
    for (const curve of curves) drawCurve(svg, chart, curve, points(curve).map(p => [chart.x(p[0]), chart.y(p[measure])]));
  }
}

function drawCurve(svg, chart, curve, points) {
  const stroke = colourOf(curve.method);
  const group = svgElement("g", { class: curve.is_chosen ? "curve chosen" : "curve" }, svg);
  svgElement("title", {}, group, curve.label);
  svgElement("polyline", { points: points.map(p => p.join()).join(" "), stroke }, group);
  for (const [x, y] of points) svgElement("circle", { cx: x, cy: y, r: curve.is_chosen ? 3 : 2, fill: stroke }, group);
  if (curve.is_stopped) {
    const [x, y] = points[points.length - 1];
    svgElement("path", { d: `M${x - 5} ${y - 5}l10 10m0-10l-10 10`, stroke }, group);
  }
}

// ---------------------------------------------------------------------------------------------- samples

const samples = data.samples && { count: SAMPLES_PER_STEP, select: document.getElementById("system") };

/** Show the outputs of a system, if the page has them. */
function selectSystem(key) {
  if (samples && data.samples.systems.some(system => system.key === key)) {
    samples.select.value = key;
    samples.count = SAMPLES_PER_STEP;
    drawSamples();
  }
}

/** The words of both texts, each with whether the word is in the longest common subsequence. */
function compareWords(a, b) {
  const left = a.split(/\s+/).filter(Boolean), right = b.split(/\s+/).filter(Boolean);
  const lengths = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i--) {
    for (let j = right.length - 1; j >= 0; j--) {
      lengths[i][j] = left[i] === right[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const common = [new Set(), new Set()];
  for (let i = 0, j = 0; i < left.length && j < right.length; ) {
    if (left[i] === right[j]) { common[0].add(i++); common[1].add(j++); }
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return [left, right].map((words, side) => words.map((word, i) => [word, common[side].has(i)]));
}

function markedText(words) {
  const text = element("p");
  for (const [word, isCommon] of words) text.append(isCommon ? word : element("mark", {}, word), " ");
  return text;
}

function sampleCard(row, baseline, system, i) {
  const [before, after] = compareWords(baseline.outputs[i], system.outputs[i]);
  const change = system.scores[i] - baseline.scores[i];
  const part = (title, ...content) => element("div", {}, element("h4", {}, title), ...content);
  const source = row.source.length > 400
    ? element("details", {}, element("summary", {}, row.source.slice(0, 300) + " …"), element("p", {}, row.source))
    : element("p", {}, row.source);
  const score = value => `${data.samples.metric_name} ${value.toFixed(1)}`;
  return element("article", { class: "sample" },
    element("h3", {}, row.id, element("span", { class: change < 0 ? "worse" : change > 0 ? "better" : "" }, signed(change, 1))),
    element("div", { class: "texts" },
      part("source", source),
      part("reference", element("p", {}, row.reference)),
      part(`${baseline.label} (${score(baseline.scores[i])})`, markedText(before)),
      part(`${system.label} (${score(system.scores[i])})`, markedText(after))));
}

function drawSamples() {
  const [baseline, ...others] = data.samples.systems;
  const system = others.find(item => item.key === samples.select.value);
  const words = document.getElementById("filter").value.toLowerCase();
  const change = i => system.scores[i] - baseline.scores[i];
  let rows = data.samples.rows.map((row, i) => i).filter(i => {
    const { source, reference } = data.samples.rows[i];
    return [source, reference, baseline.outputs[i], system.outputs[i]].some(text => text.toLowerCase().includes(words));
  });
  const order = document.getElementById("order").value;
  if (order === "regressions") rows.sort((a, b) => change(a) - change(b));
  if (order === "improvements") rows.sort((a, b) => change(b) - change(a));
  const list = document.getElementById("samples");
  list.replaceChildren(...rows.slice(0, samples.count).map(i => sampleCard(data.samples.rows[i], baseline, system, i)));
  document.getElementById("matches").textContent = `${rows.length} of ${data.samples.rows.length} rows`;
  document.getElementById("more").hidden = rows.length <= samples.count;
  drawHistograms(baseline, system);
}

function drawHistograms(baseline, system) {
  const container = document.getElementById("histograms");
  container.replaceChildren();
  const series = [["reference", "reference", "#bbb"], [baseline.key, baseline.label, "#444"], [system.key, system.label, "#D55E00"]];
  for (const { title, labels, shares } of data.samples.histograms) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const legend = element("p", { class: "legend" });
    container.append(element("figure", {}, element("figcaption", {}, title), svg, legend));
    const present = series.filter(([key]) => key in shares);
    drawBars(svg, labels, present.map(([key, , colour]) => [shares[key], colour]));
    for (const [, label, colour] of present) legend.append(element("i", { style: `background:${colour}` }), element("span", {}, label));
  }
}

function drawBars(svg, labels, series) {
  const width = Math.max(240, svg.parentElement.clientWidth), height = 200;
  const left = 40, bottom = height - 24, highest = Math.max(...series.flatMap(([values]) => values), 1e-9);
  const y = share => bottom - (share / highest) * (bottom - 10);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  for (const share of ticks(0, highest, 4)) {
    svgElement("line", { x1: left, x2: width, y1: y(share), y2: y(share), class: "grid" }, svg);
    svgElement("text", { x: left - 5, y: y(share) + 4, "text-anchor": "end" }, svg, `${short(100 * share)} %`);
  }
  const slot = (width - left) / labels.length, bar = (0.8 * slot) / series.length;
  labels.forEach((label, i) => {
    series.forEach(([values, fill], j) => {
      const size = { x: left + i * slot + 0.1 * slot + j * bar, y: y(values[i]), width: bar, height: bottom - y(values[i]) };
      svgElement("rect", { ...size, fill }, svg);
    });
    const skip = Math.ceil((labels.length * 44) / (width - left));
    if (i % skip === 0) svgElement("text", { x: left + (i + 0.5) * slot, y: height - 8, "text-anchor": "middle" }, svg, label);
  });
}

function setUpSamples() {
  for (const { key, label } of data.samples.systems.slice(1)) samples.select.append(element("option", { value: key }, label));
  const redraw = () => { samples.count = SAMPLES_PER_STEP; drawSamples(); };
  for (const id of ["system", "order", "filter"]) document.getElementById(id).addEventListener("input", redraw);
  document.getElementById("more").addEventListener("click", () => { samples.count += SAMPLES_PER_STEP; drawSamples(); });
  drawSamples();
}

// ---------------------------------------------------------------------------------------------- start

if (samples) setUpSamples();
if (front) setUpFront();
if (data.curves.length) {
  document.getElementById("measure").addEventListener("change", drawCurves);
  drawCurves();
}
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return; // a phone's address bar changes the height only
  drawnWidth = innerWidth;
  if (front) drawFront();
  if (data.curves.length) drawCurves();
  if (samples) drawSamples();
});
