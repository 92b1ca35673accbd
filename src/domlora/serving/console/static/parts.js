// The small parts that all pages are made of.

import { h } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import htm from "htm";

export const html = htm.bind(h);

export const Chip = ({ kind = "plain", children }) => html`<span class="chip ${kind}">${children}</span>`;

export const Card = ({ title, note, class: name = "", children }) => html`
  <section class="card ${name}" aria-label=${title}>
    <h3>${title}</h3>
    ${children}
    ${note && html`<p class="quiet">${note}</p>`}
  </section>`;

/** Named numbers: [[label, value, note], ...]. */
export const Figures = ({ of }) => html`
  <dl class="figures">
    ${of.map(([label, value, note]) => html`
      <div key=${label}><dt>${label}${note && html`<small>${note}</small>`}</dt><dd>${value}</dd></div>`)}
  </dl>`;

export const Empty = ({ title, children }) => html`<div class="empty"><h3>${title}</h3>${children}</div>`;

/** What is shown of a document: a failure beside what is still known, a wait, or the page. */
export function Reading({ from, children }) {
  const { data, error, again } = from;
  return html`
    ${error && html`
      <div class="failure" role="alert">
        <p><strong>${error.message}</strong> ${data ? "What you see is what was known before." : ""}</p>
        <button type="button" onClick=${again}>Try again</button>
      </div>`}
    ${data ? children(data) : !error && html`<p class="loading" role="status">Loading…</p>`}`;
}

/** The width of an element in pixels, as it is now. */
export function useWidth(first = 640) {
  const place = useRef(null);
  const [width, setWidth] = useState(first);
  useEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.max(entry.contentRect.width, 120)));
    watcher.observe(place.current);
    return () => watcher.disconnect();
  }, []);
  return [place, width];
}
