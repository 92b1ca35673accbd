// Charts as SVG in the page's own colours. Each says in words what it shows; tables beside them hold the numbers.

import { useState } from "preact/hooks";
import { html, useWidth } from "console/parts.js";
import { day } from "console/format.js";

/** A line as small as a word. Gaps are null. */
export function Spark({ values, width = 96, height = 24, label }) {
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return html`<span class="quiet" title="Two readings make a line">·</span>`;
  const [low, high] = [Math.min(0, ...known), Math.max(...known)];
  const x = (n) => 1 + ((width - 4) * n) / Math.max(values.length - 1, 1);
  const y = (value) => height - 2 - ((height - 4) * (value - low)) / (high - low || 1);
  const last = values.at(-1);
  return html`
    <svg class="spark" width=${width} height=${height} viewBox="0 0 ${width} ${height}" role="img" aria-label=${label}>
      <path d=${line(values, x, y)} />
      ${last !== null && html`<circle cx=${x(values.length - 1)} cy=${y(last)} r="2" />`}
    </svg>`;
}

/**
 * Estimates over time inside their bands.
 * series: [{ name, points: [{ time_s, value, low, high }] }], at most eight.
 */
export function Bands({ series, label, say, when, zero = true, height = 260 }) {
  const [place, width] = useWidth();
  const [at, setAt] = useState(null);
  const all = series.flatMap(({ points }) => points);
  if (!all.length) return null;
  const pad = { left: 58, right: 14, top: 12, bottom: 26 };
  const [from, to] = [Math.min(...all.map((p) => p.time_s)), Math.max(...all.map((p) => p.time_s))];
  const [low, high] = range(series, zero);
  const x = (time) => pad.left + ((width - pad.left - pad.right) * (time - from)) / (to - from || 1);
  const y = (value) => pad.top + ((height - pad.top - pad.bottom) * (high - clamp(value, low, high))) / (high - low);
  const read = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    setAt(from + ((event.clientX - box.left - pad.left) / (width - pad.left - pad.right)) * (to - from));
  };
  const marks = at === null ? [] : series.map(({ name, points }) => ({ name, point: nearest(points, at) }));
  return html`
    <div ref=${place} class="chart">
      <svg width=${width} height=${height} viewBox="0 0 ${width} ${height}" role="img" aria-label=${label}
        onPointerMove=${read} onPointerLeave=${() => setAt(null)}>
        ${ticks(low, high, 5).map((value) => html`
          <g class=${value === 0 ? "tick zero" : "tick"} key=${value}>
            <line x1=${pad.left} x2=${width - pad.right} y1=${y(value)} y2=${y(value)} />
            <text x=${pad.left - 8} y=${y(value) + 4} text-anchor="end">${say(value)}</text>
          </g>`)}
        ${times(from, to, width < 480 ? 1 : 4).map((time, n, list) => html`
          <text key=${time} class="time" x=${x(time)} y=${height - 6} text-anchor=${anchor(n, list.length)}>${day(time, to - from)}</text>`)}
        ${series.map(({ name, points }, n) => html`
          <g key=${name} class="series s${(n % 8) + 1}">
            <path class="band" d=${band(points, (p) => x(p.time_s), y)} />
            <path class="line" d=${line(points.map((p) => p.value), (i) => x(points[i].time_s), y)} />
          </g>`)}
        ${marks.map(({ name, point }, n) => html`
          <g key=${name} class="series mark s${(n % 8) + 1}">
            <line x1=${x(point.time_s)} x2=${x(point.time_s)} y1=${y(point.low)} y2=${y(point.high)} />
            <circle cx=${x(point.time_s)} cy=${y(point.value)} r="4" />
          </g>`)}
      </svg>
      <p class="readout" aria-hidden="true">
        ${marks.length
          ? marks.map(({ name, point }, n) => html`
            <span key=${name}><i class="swatch s${(n % 8) + 1}"></i>${name} <b>${say(point.value)}</b> (${say(point.low)} to ${say(point.high)}), ${when(point.time_s)}</span>`)
          : series.map(({ name }, n) => html`<span key=${name}><i class="swatch s${(n % 8) + 1}"></i>${name}</span>`)}
      </p>
    </div>`;
}

/** One row of a forest plot: an estimate and its interval on a scale that all rows share. */
export function Strip({ value, low, high, from, to, none = 0, kind = "plain" }) {
  const place = (number) => `${(100 * (clamp(number, from, to) - from)) / (to - from || 1)}%`;
  const has = [value, low, high].every((number) => number !== null && number !== undefined);
  return html`
    <svg class="strip ${kind}" width="100%" height="20" aria-hidden="true">
      <line class="none" x1=${place(none)} x2=${place(none)} y1="0" y2="20" />
      ${has && html`<line class="range" x1=${place(low)} x2=${place(high)} y1="10" y2="10" /><circle cx=${place(value)} cy="10" r="4.5" />`}
    </svg>`;
}

/** A part of a whole as a bar, from the left; or from the middle, where it may be negative. */
export function Bar({ part, middle = false, kind = "" }) {
  const size = clamp(Math.abs(part), 0, 1) * (middle ? 50 : 100);
  const from = middle ? (part < 0 ? 50 - size : 50) : 0;
  return html`
    <svg class="bar ${kind} ${part < 0 ? "negative" : ""}" width="100%" height="8" aria-hidden="true">
      <rect class="back" width="100%" height="8" rx="3" />
      <rect class="part" x="${from}%" width="${size}%" height="8" rx=${middle ? 0 : 3} />
      ${middle && html`<line x1="50%" x2="50%" y1="0" y2="8" />`}
    </svg>`;
}

/** The scale of a forest plot: all estimates, and intervals as far as three times beyond them. */
export function scale(rows) {
  const known = rows.filter((row) => row.value !== null && row.value !== undefined);
  if (!known.length) return [-1, 1];
  const widest = 3 * Math.max(...known.map((row) => Math.abs(row.value)), 0.001);
  const [low, high] = [Math.min(0, ...known.map((row) => row.low)), Math.max(0, ...known.map((row) => row.high))];
  return [Math.max(low, -widest), Math.min(high, widest)];
}

function range(series, zero) {
  // Bands are wide at the start: the scale follows their later half, and the first points are cut.
  const late = series.flatMap(({ points }) => points.slice(Math.floor(points.length / 3)));
  const values = late.flatMap((point) => [point.low, point.high]).filter(Number.isFinite);
  const [low, high] = [Math.min(...values, ...(zero ? [0] : [])), Math.max(...values, ...(zero ? [0] : []))];
  const room = 0.06 * (high - low || 1);
  return [low - room, high + room];
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(12)));
}

const times = (from, to, parts) => (to > from ? Array.from({ length: parts + 1 }, (_, n) => from + ((to - from) * n) / parts) : [from]);
const anchor = (n, length) => (n === 0 ? "start" : n === length - 1 ? "end" : "middle");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const nearest = (points, time) => points.reduce((best, point) => (Math.abs(point.time_s - time) < Math.abs(best.time_s - time) ? point : best));

function line(values, x, y) {
  let pen = "M";
  return values
    .map((value, n) => {
      if (value === null || !Number.isFinite(value)) return (pen = "M"), "";
      const step = `${pen}${x(n).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      return step;
    })
    .join("");
}

function band(points, x, y) {
  const known = points.filter((point) => Number.isFinite(point.low) && Number.isFinite(point.high));
  const place = (point, value) => `${x(point).toFixed(1)} ${y(value).toFixed(1)}`;
  const there = known.map((point) => place(point, point.high));
  const back = known.toReversed().map((point) => place(point, point.low));
  return known.length ? `M${[...there, ...back].join("L")}Z` : "";
}
