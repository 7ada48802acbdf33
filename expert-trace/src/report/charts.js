"use strict";
// Charts as SVG. Text is set as text, never as HTML.
const NAMESPACE = "http://www.w3.org/2000/svg";
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "1 4", "12 4", "4 2"];

function element(name, attributes = {}, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(parent, name, attributes, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Steps of 1, 2 or 5 times a power of ten, about `count` of them up to `most`.
function ticks(most, count) {
  const rough = Math.max(most, 1e-9) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const all = [];
  for (let at = 0; at <= most * 1.0001; at += step) all.push(Number(at.toPrecision(6)));
  return all;
}

// The frame of a chart: axes from zero, and how values become places.
function frame(figure, { label, x, y, mostX, mostY, ticksX }) {
  const [width, height, left, bottom] = [900, 320, 56, 44];
  const svg = shape(figure, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const atX = (value) => left + (value / mostX) * (width - left - 16);
  const atY = (value) => height - bottom - (value / mostY) * (height - bottom - 12);
  for (const tick of ticksX || ticks(mostX, 8)) {
    shape(svg, "text", { x: atX(tick), y: height - bottom + 16, "text-anchor": "middle" }, String(tick));
  }
  for (const tick of ticks(mostY, 5)) {
    shape(svg, "path", { class: "axis", d: `M${left} ${atY(tick)}H${width - 16}` });
    shape(svg, "text", { x: left - 6, y: atY(tick) + 4, "text-anchor": "end" }, String(tick));
  }
  shape(svg, "text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, x);
  shape(svg, "text", { x: 12, y: height / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${height / 2})` }, y);
  return { svg, atX, atY };
}

function path(points, { atX, atY }) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${atX(x).toFixed(1)} ${atY(y).toFixed(1)}`).join("");
}

// Lines with names: [{ name, points: [[x, y]] }].
function lineChart(figure, options, lines) {
  const chart = frame(figure, options);
  lines.forEach(({ points }, index) => {
    const stroke = COLOURS[index % COLOURS.length];
    const dash = DASHES[index % DASHES.length];
    shape(chart.svg, "path", { d: path(points, chart), fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": dash });
  });
  const legend = shape(figure, "svg", { viewBox: `0 0 900 ${24 * Math.ceil(lines.length / 4)}`, "aria-hidden": "true" });
  lines.forEach(({ name }, index) => {
    const [x, y] = [56 + 210 * (index % 4), 14 + 24 * Math.floor(index / 4)];
    const stroke = COLOURS[index % COLOURS.length];
    shape(legend, "path", { d: `M${x} ${y}h34`, stroke, "stroke-width": 2, "stroke-dasharray": DASHES[index % DASHES.length] });
    shape(legend, "text", { x: x + 40, y: y + 4 }, name);
  });
}

// Bars with a text for each, which a pointer shows: [{ name, value, text }].
function barChart(figure, options, bars) {
  const width = 0.8;
  const labels = Math.ceil(bars.length / 24);
  const chart = frame(figure, { ...options, mostX: bars.length, ticksX: [] });
  bars.forEach(({ name, value, text }, index) => {
    const [x, y] = [chart.atX(index + (1 - width) / 2), chart.atY(value)];
    const bar = shape(chart.svg, "rect", { x, y, width: chart.atX(width) - chart.atX(0), height: chart.atY(0) - y, fill: COLOURS[0] });
    shape(bar, "title", {}, text);
    if (index % labels === 0) {
      shape(chart.svg, "text", { x: chart.atX(index + 0.5), y: chart.atY(0) + 16, "text-anchor": "middle" }, name);
    }
  });
}

// A table; cells are text. `kind` is a class.
function table(parent, caption, head, rows, kind = "") {
  const made = element("table", kind ? { class: kind } : {});
  made.append(element("caption", { class: "skip" }, caption));
  const line = element("tr");
  for (const name of head) line.append(element("th", { scope: "col" }, name));
  const top = element("thead");
  top.append(line);
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    row.forEach((cell, index) => {
      line.append(index ? element("td", {}, cell) : element("th", { scope: "row" }, cell));
    });
    body.append(line);
  }
  made.append(top, body);
  parent.replaceChildren(made);
}
