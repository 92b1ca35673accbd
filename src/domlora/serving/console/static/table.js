// A table that can be searched, sorted and read by screen readers, of one row or thousands.

import { useState } from "preact/hooks";
import { html } from "console/parts.js";
import { count } from "console/format.js";

const page = 50;

/**
 * columns: [{ key, title, show(row), value(row), left, note }]; what has a value can be sorted by it, empty ones last.
 * The first column names the row.
 */
export function Table({ caption, columns, rows, sort, search, empty = "Nothing here yet.", of = "rows", id = (row) => row.name }) {
  const [[by, down], setOrder] = useState(sort ?? [null, false]);
  const [words, setWords] = useState("");
  const [shown, setShown] = useState(page);
  const found = words ? rows.filter((row) => search(row).toLowerCase().includes(words.toLowerCase())) : rows;
  const column = columns.find(({ key }) => key === by);
  const ordered = column ? sorted(found, column.value, down) : found;
  const turn = (key, left) => setOrder(key === by ? [key, !down] : [key, !left]);
  return html`
    ${search && html`
      <div class="search">
        <label>Search <input type="search" value=${words} onInput=${(event) => { setWords(event.target.value); setShown(page); }} /></label>
        <span role="status" class="quiet">${count(found.length)} of ${count(rows.length)} ${of}</span>
      </div>`}
    <div class="scroll" tabindex="0" role="region" aria-label=${caption}>
      <table>
        <caption><span>${caption}</span></caption>
        <thead><tr>${columns.map((each) => html`<${Heading} key=${each.key} of=${each} by=${by} down=${down} turn=${turn} />`)}</tr></thead>
        <tbody>
          ${ordered.slice(0, shown).map((row) => html`<tr key=${id(row)}>${columns.map((each, n) => cell(each, row, n))}</tr>`)}
          ${!found.length && html`<tr><td class="left quiet" colspan=${columns.length}>${words ? `No name holds “${words}”.` : empty}</td></tr>`}
        </tbody>
      </table>
    </div>
    ${shown < found.length && html`
      <p class="more">
        <button type="button" onClick=${() => setShown(shown + page)}>Show ${Math.min(page, found.length - shown)} more</button>
        <button type="button" onClick=${() => setShown(found.length)}>Show all ${count(found.length)}</button>
      </p>`}`;
}

function Heading({ of: { key, title, note, value, left }, by, down, turn }) {
  const name = left ? "left" : "";
  if (!value) return html`<th scope="col" class=${name} title=${note}><span class="plain">${title}</span></th>`;
  const order = key === by ? (down ? "descending" : "ascending") : undefined;
  return html`
    <th scope="col" class=${name} aria-sort=${order} title=${note}>
      <button type="button" onClick=${() => turn(key, left)}>${title}<span aria-hidden="true">${order ? (down ? " ↓" : " ↑") : " ↕"}</span></button>
    </th>`;
}

function cell({ key, show, left }, row, n) {
  const name = left ? "left" : "";
  return n ? html`<td key=${key} class=${name}>${show(row)}</td>` : html`<th key=${key} scope="row">${show(row)}</th>`;
}

function sorted(rows, value, down) {
  const sign = down ? -1 : 1;
  const none = (x) => x === null || x === undefined || Number.isNaN(x);
  return [...rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (none(a) || none(b)) return none(a) - none(b);
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  });
}
