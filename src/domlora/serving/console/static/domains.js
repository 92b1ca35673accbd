// Every domain: its adapter, and what it does now.

import { means, rates } from "console/data.js";
import { compact, count, fixed, percent, rate } from "console/format.js";
import { Spark } from "console/charts.js";
import { Chip, Reading, html } from "console/parts.js";
import { Table } from "console/table.js";

const ratio = ({ predicted, observed }) => (observed ? predicted / observed : null);
const now = (row) => rates(`domain ${row.name}`, "rows").at(-1) ?? null;

const columns = [
  { key: "name", title: "Domain", left: true, value: (row) => row.name, show: (row) => html`${row.name}${row.pinned && html` <${Chip}>pinned<//>`}` },
  { key: "now", title: "Rows now", value: now, show: (row) => html`<span class="with-spark">${rate(now(row))}<${Spark} values=${rates(`domain ${row.name}`, "rows")} label="Rows a second of ${row.name}" /></span>` },
  { key: "rows", title: "Rows", value: (row) => row.rows, show: (row) => compact(row.rows) },
  { key: "requests", title: "Requests", value: (row) => row.requests, show: (row) => compact(row.requests) },
  { key: "score", title: "Mean score", value: (row) => row.mean_score, show: (row) => html`<span class="with-spark">${percent(row.mean_score, 2)}<${Spark} values=${means(`domain ${row.name}`, "score_sum", "rows")} width="64" label="Mean score of ${row.name}" /></span>` },
  { key: "ratio", title: "Predicted / observed", value: ratio, show: (row) => fixed(ratio(row)), note: "Over rows with feedback; 1 is calibrated" },
  { key: "feedback", title: "With feedback", value: (row) => row.matched, show: (row) => compact(row.matched) },
  { key: "version", title: "Adapter", value: (row) => row.version ?? "", show: (row) => html`${row.version ?? "none"}${!row.resident && html` <span class="quiet">on disk</span>`}`, note: "Its version; one on disk is read when it is asked for" },
  { key: "rank", title: "Rank", value: (row) => row.rank, show: (row) => count(row.rank), note: "The largest of its layers" },
  { key: "failed", title: "Refused", value: (row) => row.failed, show: (row) => compact(row.failed), note: "Answers with a status of 400 or above" },
];

export const Domains = ({ domains }) => html`<${Reading} from=${domains}>${(data) => html`
  <p class="lead">Counted since the server started, over all its workers. Lines show what came since this page was opened.</p>
  <${Table} caption="Domains of version ${data.bundle}" columns=${columns} rows=${data.domains} sort=${["rows", true]}
    search=${(row) => row.name} of="domains" empty="The model has no domains." />
  ${data.shared && html`<p class="quiet">Domains without counters of their own: ${count(data.shared.requests)} requests, ${count(data.shared.rows)} rows together. <code>--metrics-domains</code> sets how many have them.</p>`}
  ${data.mixed && html`<p class="quiet">Requests of several domains or none: ${count(data.mixed.requests)} requests, ${count(data.mixed.rows)} rows.</p>`}`}<//>`;
