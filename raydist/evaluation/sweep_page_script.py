"""Markup and script of the interactive sweep page; :mod:`raydist.evaluation.sweep_page` fills in the data."""

PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<style>
body { font: 14px/1.35 system-ui, sans-serif; color: #22262b; max-width: 82em; margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.2em; margin: 0; }
p { margin: .3em 0 .8em; color: #607d8b; font-size: .9em; }
svg { display: block; width: 100%; height: auto; user-select: none; }
svg text { font: 11px system-ui, sans-serif; fill: #22262b; }
svg text { paint-order: stroke; stroke: white; stroke-width: 3px; } svg .name { font-weight: 600; }
svg .axis { stroke: #9aa2ab; } svg .grid { stroke: #e6e9ec; }
svg .hit { fill: transparent; cursor: crosshair; } svg .brush { fill: #1b6ca8; opacity: .22; pointer-events: none; }
svg path { fill: none; stroke-width: 1.6; } svg path.unfinished { stroke-dasharray: 2 3; stroke: #7d868f; }
svg .front { fill: none; stroke: #d1495b; stroke-width: 1.3; pointer-events: none; }
svg circle { stroke: white; stroke-width: .7; } svg circle.unfinished { fill: white; stroke: #7d868f; }
.halo { fill: none; stroke: transparent; stroke-width: 9; stroke-dasharray: none !important; }
.off { opacity: .1; }
path.on { stroke: #d1495b !important; stroke-width: 3.4; } circle.on { fill: #d1495b !important; stroke: #22262b; }
path.halo.on { stroke: transparent !important; }
tr.on td { background: #fbe7ea; }
.row { display: grid; grid-template-columns: 1fr 1fr; gap: 2em; margin: 1em 0; }
select, button { font: inherit; font-size: .9em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92em; }
th { text-align: left; cursor: pointer; border-bottom: 2px solid #9aa2ab; white-space: nowrap; }
th, td { padding: .25em .7em .25em 0; } td { border-bottom: 1px solid #e6e9ec; }
td.number, th.number { text-align: right; }
#tip { position: fixed; pointer-events: none; background: #22262b; color: white; border-radius: 4px; padding: .4em .7em;
  font-size: .85em; white-space: pre; display: none; z-index: 1; }
@media (max-width: 60em) { .row { grid-template-columns: 1fr; } }
</style></head><body>
<h1>@TITLE@</h1>
<p>@SUMMARY@ &middot; drag along an axis to keep only the trials in that range, click it to let go; click a trial to mark it
<button id="reset">show all</button> <span id="kept"></span></p>
<svg id="parallel" viewBox="0 0 1200 370"></svg>
<div class="row">
<div><select id="metric"></select> against the step<svg id="curves" viewBox="0 0 580 340"></svg></div>
<div><select id="up"></select> against <select id="right"></select><svg id="scatter" viewBox="0 0 580 340"></svg></div>
</div>
<table><thead id="head"></thead><tbody id="body"></tbody></table>
<div id="tip"></div>
<script>
const data = @DATA@;
"""
    + r"""
const element = id => document.getElementById(id);
const quoted = text => String(text).replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
const short = value => value === null || value === undefined ? "" : String(Number(value.toPrecision(4)));
const finished = trial => trial.state === "finished";
const brushes = new Map(), pinned = new Set();
let order = {column: 0, sign: 1};

const kept = trial => [...brushes].every(([axis, [low, high]]) => {
  const at = trial.heights[axis];
  return at !== null && at >= low && at <= high;
});

// ---- parallel coordinates: positions go from 0 to 1, absent values lie below
const box = {left: 110, right: 1100, top: 42, bottom: 315};
const lowest = Math.min(0, ...data.axes.flatMap(axis => axis.ticks.map(tick => tick[0])));
const axisX = index => data.axes.length < 2 ? 600 : box.left + index * (box.right - box.left) / (data.axes.length - 1);
const axisY = at => box.bottom - (at - lowest) / (1 - lowest) * (box.bottom - box.top);
const atOfY = y => lowest + (box.bottom - y) / (box.bottom - box.top) * (1 - lowest);

function trialPath(trial) {
  const points = trial.heights.map((at, index) => at === null ? null : [axisX(index), axisY(at)]).filter(Boolean);
  return points.map(([x, y], index) => {
    if (index === 0) return `M${x},${y}`;
    const [left, before] = points[index - 1], bend = (x - left) * 0.4;
    return `C${left + bend},${before} ${x - bend},${y} ${x},${y}`;
  }).join("");
}

const brushRect = (x, top, bottom) =>
  `<rect class="brush" x="${x - 9}" width="18" y="${top}" height="${bottom - top}"/>`;

function drawParallel() {
  const lines = data.trials.map((trial, index) => {
    const path = trialPath(trial);
    return `<path class="${finished(trial) ? "" : "unfinished"}" data-trial="${index}" stroke="${trial.colour}" d="${path}"/>`
      + `<path class="halo" data-trial="${index}" d="${path}"/>`;
  }).reverse();
  const axes = data.axes.map((axis, index) => {
    const x = axisX(index), bar = brushes.get(index);
    const ticks = axis.ticks.map(([at, text]) =>
      `<text x="${x - 7}" y="${axisY(at) + 4}" text-anchor="end">${quoted(text)}</text>`
      + `<line class="axis" x1="${x - 4}" x2="${x}" y1="${axisY(at)}" y2="${axisY(at)}"/>`);
    return `<line class="axis" x1="${x}" x2="${x}" y1="${box.top}" y2="${box.bottom}"/>${ticks.join("")}`
      + `<text class="name" x="${x}" y="22" text-anchor="middle">${quoted(axis.label)}</text>`
      + (bar ? brushRect(x, axisY(bar[1]), axisY(bar[0])) : "")
      + `<rect class="hit" data-axis="${index}" x="${x - 11}" width="22" y="${box.top - 10}"
          height="${box.bottom - box.top + 20}"/>`;
  });
  element("parallel").innerHTML = lines.join("") + axes.join("");
}

// ---- two charts with numeric axes
const frame = {left: 66, right: 565, top: 14, bottom: 300};

function roundTicks(low, high) {
  if (high <= low) return [low];
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(candidate => candidate >= raw * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
  return ticks;
}

function numericAxis(low, high) {
  const margin = 0.06 * ((high - low) || Math.abs(high) || 1);
  const [from, to] = [low - margin, high + margin];
  const at = value => (value - from) / (to - from);
  return {at, ticks: roundTicks(from, to).map(value => [at(value), short(value)])};
}

function drawFrame(across, upward) {
  const x = at => frame.left + at * (frame.right - frame.left), y = at => frame.bottom - at * (frame.bottom - frame.top);
  const marks = across.ticks.map(([at, text]) =>
    `<line class="grid" x1="${x(at)}" x2="${x(at)}" y1="${frame.top}" y2="${frame.bottom}"/>`
    + `<text x="${x(at)}" y="${frame.bottom + 17}" text-anchor="middle">${quoted(text)}</text>`)
    .concat(upward.ticks.map(([at, text]) =>
    `<line class="grid" x1="${frame.left}" x2="${frame.right}" y1="${y(at)}" y2="${y(at)}"/>`
    + `<text x="${frame.left - 7}" y="${y(at) + 4}" text-anchor="end">${quoted(text)}</text>`));
  return {x, y, marks: marks.join("")};
}

const clip = at => Math.min(1, Math.max(0, at));

function drawCurves() {
  const metric = data.metrics[element("metric").value];
  if (!metric) return;
  const curves = data.trials.map(trial => trial.curves[metric.name] || []);
  const best = curves.find(curve => curve.length) || [];
  const start = best.length ? 0.1 * best[best.length - 1][0] : 0;
  const values = [...metric.ends, ...best.filter(point => point[0] >= start).map(point => point[1])];
  const across = numericAxis(0, Math.max(1, ...curves.flat().map(point => point[0])));
  const upward = numericAxis(Math.min(...values), Math.max(...values));
  const {x, y, marks} = drawFrame(across, upward);
  const lines = curves.map((curve, index) => {
    if (!curve.length) return "";
    const trial = data.trials[index], points = curve.map(([step, value]) => [x(across.at(step)), y(clip(upward.at(value)))]);
    const path = "M" + points.map(point => point.join(",")).join("L"), end = points[points.length - 1];
    const unfinished = finished(trial) ? "" : "unfinished";
    return `<path class="${unfinished}" data-trial="${index}" stroke="${trial.colour}" d="${path}"/>`
      + `<path class="halo" data-trial="${index}" d="${path}"/>`
      + `<circle class="${unfinished}" data-trial="${index}" cx="${end[0]}" cy="${end[1]}" r="3.5" fill="${trial.colour}"/>`;
  }).reverse();
  element("curves").innerHTML = marks + lines.join("");
}

const choices = data.metrics.map(metric => ({
  text: metric.name, axis: numericAxis(...metric.final), metric: metric.name,
  of: (trial, axis) => trial.values[metric.name] === null ? null : clip(axis.at(trial.values[metric.name])),
})).concat(data.axes.filter(axis => !axis.goal).map((axis, index) => ({
  text: axis.label, axis: {ticks: axis.ticks.map(([at, text]) => [0.05 + 0.9 * squeeze(at), text])},
  of: trial => 0.05 + 0.9 * squeeze(trial.at[index]),
})));

function squeeze(at) { return (at - lowest) / (1 - lowest); }

function frontPath(points, rightIsMin) {
  const sorted = [...points].sort((one, other) => one[0] - other[0]);
  return sorted.map(([x, y], index) => {
    if (index === 0) return `M${x},${y}`;
    return rightIsMin ? `H${x}V${y}` : `V${y}H${x}`;
  }).join("");
}

function drawScatter() {
  const up = choices[element("up").value], right = choices[element("right").value];
  if (!up || !right) return;
  const {x, y, marks} = drawFrame(right.axis, up.axis);
  const places = data.trials.map(trial => [right.of(trial, right.axis), up.of(trial, up.axis)]);
  const dots = places.map(([a, b], index) => {
    const trial = data.trials[index];
    return a === null || b === null ? "" : `<circle class="${finished(trial) ? "" : "unfinished"}" data-trial="${index}"
      cx="${x(a)}" cy="${y(b)}" r="5.5" fill="${trial.colour}"/>`;
  }).reverse();
  const goals = data.goals.slice(0, 2);
  const ofGoals = goals.length === 2 && goals[0] === up.metric && goals[1] === right.metric;
  const front = ofGoals ? places.filter((_, index) => data.trials[index].front).map(([a, b]) => [x(a), y(b)]) : [];
  const rightIsMin = data.metrics.some(metric => metric.name === right.metric && metric.mode === "min");
  element("scatter").innerHTML = marks + `<path class="front" d="${frontPath(front, rightIsMin)}"/>` + dots.join("");
}

// ---- the ranking
const parameters = data.axes.filter(axis => !axis.goal);
const columns = [
  {text: "#", of: trial => trial.place, number: true},
  {text: "trial", of: trial => trial.name},
  ...parameters.map((axis, index) => ({text: axis.label, of: trial => trial.numbers[index], show: trial => trial.texts[index],
    number: data.trials.every(trial => typeof trial.numbers[index] !== "string")})),
  {text: "step", of: trial => trial.steps, number: true},
  ...data.goals.map(goal => ({text: goal, of: trial => trial.values[goal] ?? null, number: true})),
  {text: "state", of: trial => trial.state},
  {text: "time", of: trial => trial.seconds, show: trial => trial.time, number: true},
];

function compare(one, other) {
  const column = columns[order.column], a = column.of(one) ?? null, b = column.of(other) ?? null;
  if (a === null || b === null) return (a === null) - (b === null);
  return order.sign * (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1);
}

function drawTable() {
  element("head").innerHTML = "<tr>" + columns.map((column, index) =>
    `<th class="${column.number ? "number" : ""}" data-column="${index}">${quoted(column.text)}${
      index === order.column ? (order.sign > 0 ? " &#9652;" : " &#9662;") : ""}</th>`).join("") + "</tr>";
  const rows = data.trials.map((trial, index) => [trial, index]).sort((one, other) => compare(one[0], other[0]));
  element("body").innerHTML = rows.map(([trial, index]) => `<tr data-trial="${index}">` + columns.map(column => {
    const value = column.show ? column.show(trial) : column.of(trial);
    const text = column.number && typeof value === "number" ? short(value) : value ?? "";
    return `<td class="${column.number ? "number" : ""}">${quoted(text)}</td>`;
  }).join("") + "</tr>").join("");
}

// ---- what is kept, marked and pointed at
function mark(pointed) {
  const keep = data.trials.map(kept);
  for (const node of document.querySelectorAll("[data-trial]")) {
    const index = Number(node.dataset.trial);
    node.classList.toggle("off", !keep[index]);
    node.classList.toggle("on", index === pointed || pinned.has(index));
  }
  element("kept").textContent = brushes.size ? `${keep.filter(Boolean).length} of ${keep.length} trials kept` : "";
}

function drawAll() { drawParallel(); drawCurves(); drawScatter(); drawTable(); mark(null); }

function trialOf(event) {
  const node = event.target.closest("[data-trial]");
  return node && !node.classList.contains("off") ? Number(node.dataset.trial) : null;
}

document.addEventListener("pointermove", event => {
  const index = trialOf(event), tip = element("tip");
  tip.style.display = index === null ? "none" : "block";
  mark(index);
  if (index === null) return;
  const trial = data.trials[index], metrics = Object.entries(trial.values).filter(([, value]) => value !== null);
  tip.textContent = [`${trial.name}   ${trial.state}, step ${trial.steps}`,
    ...parameters.map((axis, place) => `${axis.key}: ${trial.texts[place]}`),
    ...metrics.map(([name, value]) => `${name}: ${short(value)}`)].join("\n");
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
});

document.addEventListener("click", event => {
  const column = event.target.closest("[data-column]"), index = trialOf(event);
  if (column) {
    const chosen = Number(column.dataset.column);
    order = {column: chosen, sign: chosen === order.column ? -order.sign : 1};
    drawTable();
  } else if (index !== null) {
    if (!pinned.delete(index)) pinned.add(index);
  }
  mark(index);
});

function heightOf(event) {
  const svg = element("parallel"), point = svg.createSVGPoint();
  point.x = event.clientX;
  point.y = event.clientY;
  return atOfY(point.matrixTransform(svg.getScreenCTM().inverse()).y);
}

element("parallel").addEventListener("pointerdown", event => {
  const hit = event.target.closest("[data-axis]");
  if (!hit) return;
  const axis = Number(hit.dataset.axis), start = heightOf(event);
  brushes.delete(axis);
  const drag = moved => {
    const end = heightOf(moved);
    brushes.set(axis, [Math.min(start, end), Math.max(start, end)]);
    drawParallel();
    mark(null);
  };
  const stop = released => {
    removeEventListener("pointermove", drag);
    if (Math.abs(heightOf(released) - start) < 0.01) brushes.delete(axis);
    drawParallel();
    mark(null);
  };
  addEventListener("pointermove", drag);
  addEventListener("pointerup", stop, {once: true});
});

element("reset").onclick = () => { brushes.clear(); pinned.clear(); drawAll(); };

function fill(id, texts, chosen) {
  element(id).innerHTML = texts.map((text, index) => `<option value="${index}">${quoted(text)}</option>`).join("");
  element(id).value = Math.min(chosen, texts.length - 1);
}
fill("metric", data.metrics.map(metric => metric.name), 0);
fill("up", choices.map(choice => choice.text), 0);
fill("right", choices.map(choice => choice.text), data.goals.length > 1 ? 1 : data.metrics.length);
element("metric").onchange = element("up").onchange = element("right").onchange = drawAll;
drawAll();
</script></body></html>
"""
)
