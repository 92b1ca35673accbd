// The frame: what is served, the pages, and what all of them need.

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Domains } from "console/domains.js";
import { Drift } from "console/drift.js";
import { Experiments } from "console/experiments.js";
import { Score } from "console/score.js";
import { Versions } from "console/versions.js";
import { recorded, remember, useData } from "console/data.js";
import { clock, moment } from "console/format.js";
import { html } from "console/parts.js";

const pages = [
  ["versions", "Versions", Versions],
  ["domains", "Domains", Domains],
  ["experiments", "Experiments", Experiments],
  ["drift", "Drift", Drift],
  ["score", "Score", Score],
];
const every = 5; // seconds between two readings

/** The page and its argument, from an address such as #/experiments/new-rank. */
function place() {
  const [page, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const known = pages.find(([name]) => name === page) ?? pages[0];
  return { page: known[0], title: known[1], Page: known[2], name: decodeURIComponent(rest.join("/")) };
}

function keepTraffic({ now_s, traffic }) {
  remember("all", now_s, { requests: traffic.requests, rows: traffic.rows, failed: traffic.failed });
}

function keepDomains({ now_s, domains }) {
  for (const { name, requests, rows, score_sum } of domains) remember(`domain ${name}`, now_s, { requests, rows, score_sum });
}

function Console() {
  const [here, setHere] = useState(place);
  const [paused, setPaused] = useState(false);
  const heading = useRef(null);
  const overview = useData("overview", { every, paused, then: keepTraffic });
  const domains = useData("domains", { every, paused, then: keepDomains });
  useEffect(() => {
    const move = () => setHere(place());
    addEventListener("hashchange", move);
    return () => removeEventListener("hashchange", move);
  }, []);
  const moved = useRef(false);
  useEffect(() => {
    document.title = `${here.name || here.title} · domlora console`;
    if (moved.current) heading.current?.focus();
    moved.current = true;
  }, [here.page, here.name]);
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); heading.current?.focus(); }}>Skip to the content</a>
    <header>
      <a class="name" href="#/versions">domlora</a>
      <${Status} of=${overview} paused=${paused} />
      <div class="switches">
        ${!recorded && html`<button type="button" aria-pressed=${paused} onClick=${() => setPaused(!paused)}>Pause<span class="wide"> updates</span></button>`}
        <${Theme} />
      </div>
    </header>
    <nav aria-label="Pages">
      <ul>${pages.map(([name, title]) => html`
        <li key=${name}><a href="#/${name}" aria-current=${name === here.page ? "page" : undefined}>${title}</a></li>`)}</ul>
    </nav>
    <main id="main">
      <h1 ref=${heading} tabindex="-1">${here.title}</h1>
      <${here.Page} name=${here.name} overview=${overview} domains=${domains} paused=${paused} every=${every} />
    </main>
    <footer>${recorded ? `Saved ${moment(recorded.overview.now_s)} from ${recorded.overview.model}. ` : ""}This page only looks: nothing here changes what is served.</footer>`;
}

function Status({ of: { data, error }, paused }) {
  if (recorded) return html`<p class="status"><i class="dot idle"></i>${data?.model ?? ""} <span class="quiet">saved page</span></p>`;
  const [kind, word] = error ? ["bad", "no answer"] : !data ? ["idle", "connecting"] : paused ? ["idle", "paused"] : ["good", "live"];
  return html`
    <p class="status" role="status">
      <i class="dot ${kind}"></i>${data ? html`<b>${data.model}</b> version ${data.bundle} ` : ""}
      <span class="quiet">${word}${data && (paused || error) ? `, as of ${clock(data.now_s)}` : ""}</span>
    </p>`;
}

function Theme() {
  const root = document.documentElement;
  const [theme, setTheme] = useState(root.dataset.theme ?? "");
  const choose = (value) => {
    if (value) root.dataset.theme = value;
    else delete root.dataset.theme;
    try {
      localStorage.setItem("domlora-theme", value);
    } catch { /* a saved page may have no storage */ }
    setTheme(value);
  };
  return html`
    <label class="theme"><span class="hidden">Colours</span>
      <select value=${theme} onChange=${(event) => choose(event.target.value)}>
        <option value="">System</option><option value="light">Light</option><option value="dark">Dark</option>
      </select>
    </label>`;
}

const root = document.getElementById("console");
root.replaceChildren();
render(html`<${Console} />`, root);
