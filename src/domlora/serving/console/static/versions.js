// What is served, how it does, and where it comes from.

import { useState } from "preact/hooks";
import { rates, useData } from "console/data.js";
import { brief, compact, count, fixed, milliseconds, moment, percent, plural, rate } from "console/format.js";
import { Spark } from "console/charts.js";
import { Card, Chip, Empty, Figures, Reading, html } from "console/parts.js";
import { Table } from "console/table.js";

export const Versions = ({ overview }) => html`<${Reading} from=${overview}>${(data) => html`
  <${Served} data=${data} />
  <${Traffic} traffic=${data.traffic} />
  <h2>Versions</h2>
  <${Lineage} versions=${data.versions} />`}<//>`;

const Served = ({ data }) => html`
  <${Figures} of=${[
    ["model", data.backbone],
    ["version served", data.bundle],
    ["domains", count(data.num_domains)],
    ["features", count(data.num_features)],
    ["adapted layers", count(data.adapted_layers)],
    ["unknown domain gets", data.settings.unknown_domain === "base" ? "the base" : data.settings.unknown_domain],
  ]} />`;

function Traffic({ traffic }) {
  const { latency } = traffic;
  const refused = Object.entries(traffic.rejected);
  return html`
    <h2>Traffic</h2>
    <div class="cards">
      <${Card} title="Requests">
        <p class="big">${rate(rates("all", "requests").at(-1))} <${Spark} values=${rates("all", "requests")} width="140" height="32" label="Requests a second since this page was opened" /></p>
        <p class="quiet">${compact(traffic.requests)} scored since the start, ${compact(traffic.refused)} refused, ${compact(traffic.failed)} failed</p>
      <//>
      <${Card} title="Rows">
        <p class="big">${rate(rates("all", "rows").at(-1))} <${Spark} values=${rates("all", "rows")} width="140" height="32" label="Rows a second since this page was opened" /></p>
        <p class="quiet">${compact(traffic.rows)} since the start, ${compact(traffic.unknown_domain_rows)} of a domain without an adapter</p>
      <//>
      <${Card} title="Latency of scoring">
        <p class="big">${milliseconds(latency?.p50)} <small>median</small></p>
        <p class="quiet">90 % within ${milliseconds(latency?.p90)}, 99 % within ${milliseconds(latency?.p99)}, since the start</p>
      <//>
      <${Card} title="Workers">
        <p class="big">${count(traffic.workers)}</p>
        <p class="quiet">${plural(traffic.worker_starts, "start")}, ${plural(traffic.swaps, "swap")} of version or adapter${refused.length ? `; refused by a limit: ${refused.map(([why, n]) => `${why} ${count(n)}`).join(", ")}` : ""}</p>
      <//>
    </div>`;
}

function Lineage({ versions }) {
  if (!versions.length) return html`<${Empty} title="No history"><p>What is served was exported without a record of where it comes from.</p><//>`;
  return html`<ol class="lineage">${versions.toReversed().map((version) => html`<${Version} key=${version.version} of=${version} />`)}</ol>`;
}

function Version({ of: version }) {
  const [open, setOpen] = useState(false);
  const gate = version.gate;
  return html`
    <li class=${version.live ? "live" : ""}>
      <div class="card">
        <h3>Version ${version.version}
          ${version.live && html` <${Chip} kind="good">served<//>`}
          ${version.default && html` <${Chip}>default<//>`}
          ${gate && !gate.passed && html` <${Chip} kind="bad">stopped by the gate<//>`}
        </h3>
        <p>${story(version)}</p>
        <${Figures} of=${[
          ["written", moment(version.created)],
          ["domains", count(version.domains)],
          ["data", html`<code title=${version.data}>${brief(version.data)}</code>`],
          ["validation AUC", percent(version.valid, 2)],
          ["domlora", version.library_version ?? "–"],
        ]} />
        ${gate?.reasons.length > 0 && html`<ul class="reasons">${gate.reasons.map((line) => html`<li key=${line}>${line}</li>`)}</ul>`}
        ${gate?.warnings.length > 0 && html`<ul class="reasons">${gate.warnings.map((line) => html`<li key=${line}>${line}</li>`)}</ul>`}
        ${version.judged_domains > 0 && html`
          <details onToggle=${(event) => setOpen(event.currentTarget.open)}>
            <summary>AUC of ${plural(version.judged_domains, "domain")}</summary>
            ${open && html`<${Judged} number=${version.version} />`}
          </details>`}
      </div>
    </li>`;
}

function Judged({ number }) {
  const figures = useData(`versions/${number}`);
  return html`<${Reading} from=${figures}>${({ auc }) => html`
    <${Table} caption="On the rows that version ${number} was judged on when it was written" rows=${auc} columns=${columns}
      sort=${["auc", false]} search=${auc.length > 20 ? (row) => row.name : undefined} of="domains" />`}<//>`;
}

const columns = [
  { key: "name", title: "Domain", left: true, show: (row) => row.name, value: (row) => row.name },
  { key: "auc", title: "AUC", show: (row) => percent(row.auc, 2), value: (row) => row.auc },
  { key: "error", title: "± standard error", show: (row) => fixed(100 * row.standard_error, 2), value: (row) => row.standard_error },
  { key: "score", title: "Mean score", show: (row) => percent(row.mean_score, 2), value: (row) => row.mean_score },
  { key: "rarer", title: "Rows of the rarer class", show: (row) => count(row.rarer), value: (row) => row.rarer },
];

/** Where a version comes from, in a sentence. */
function story({ parent, method, onboarded, written }) {
  const what = onboarded.length ? `${onboarded.length > 1 ? "Domains" : "Domain"} ${onboarded.join(", ")} added` : method === "update" ? "A day learned" : method ? `Trained by ${method}` : "Origin not recorded";
  const parts = Object.entries(written).map(([part, n]) => (part === "adapters" ? plural(n, "adapter") : part));
  return `${what}${parent ? `, from version ${parent}` : ""}${parts.length ? `; it wrote ${parts.join(", ")}` : ""}.`;
}
