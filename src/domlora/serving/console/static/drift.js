// Whether the world is still the one the model learned.

import { useData } from "console/data.js";
import { compact, count, fixed, interval, percent, plural } from "console/format.js";
import { Bar, Strip } from "console/charts.js";
import { Chip, Empty, Figures, Reading, html } from "console/parts.js";
import { Table } from "console/table.js";

const words = { high: ["bad", "predicts too much"], low: ["bad", "predicts too little"], fine: ["good", "as observed"], few: ["plain", "too few to say"] };

export function Drift({ paused, every }) {
  const drift = useData("drift", { every: 2 * every, paused });
  return html`<${Reading} from=${drift}>${(data) => html`
    <${Summary} data=${data} />
    <h2>Predicted against observed</h2>
    <${Calibration} data=${data} />
    <h2>Unknown values</h2>
    <${Unknown} data=${data} />
    <h2>Mean score against training</h2>
    <${Scores} data=${data} />`}<//>`;
}

function Summary({ data }) {
  const off = data.domains.filter(({ verdict }) => verdict === "high" || verdict === "low").length;
  const judged = data.domains.filter(({ verdict }) => verdict !== "few").length;
  const worst = data.features.reduce((most, each) => ((each.share ?? 0) > (most?.share ?? 0) ? each : most), null);
  return html`<${Figures} of=${[
    ["domains off", judged ? `${count(off)} of ${count(judged)}` : "–", "of those with feedback enough to judge"],
    ["most unknown values", worst ? percent(worst.share) : "none", worst?.name],
    ["rows of unknown domains", count(data.unknown_domain_rows)],
  ]} />`;
}

function Calibration({ data }) {
  const rows = data.domains.filter(({ matched }) => matched > 0);
  if (!rows.length) return html`<${Empty} title="No feedback yet"><p>Send what happened to <code>POST /v1/feedback</code>, and this shows, for each domain, whether clicks come as predicted. A row is judged when clicks have had their time to come, ten minutes after it was answered.</p><//>`;
  const [from, to] = [0, Math.min(3, Math.max(1.5, ...rows.map(({ ratio }) => ratio ?? 0)))];
  return html`<${Table} rows=${rows} search=${(row) => row.name} of="domains" sort=${["ratio", true]}
    caption="Predicted over observed clicks, with an interval of ${percent(data.confidence, 0)}. A domain is off where the interval leaves 1 out and the ratio is more than ${percent(data.tolerance, 0)} away."
    columns=${[
      { key: "name", title: "Domain", left: true, show: (row) => row.name, value: (row) => row.name },
      { key: "verdict", title: "Verdict", left: true, show: (row) => html`<${Chip} kind=${words[row.verdict][0]}>${words[row.verdict][1]}<//>`, value: (row) => row.verdict },
      { key: "ratio", title: "Ratio", show: (row) => fixed(row.ratio), value: (row) => row.ratio },
      { key: "interval", title: "Interval", show: (row) => interval(row.low, row.high, fixed) },
      { key: "strip", title: `0 to ${fixed(to, 1)}, line at 1`, left: true, show: (row) => html`<${Strip} value=${row.ratio} low=${row.low} high=${row.high} from=${from} to=${to} none=${1} kind=${words[row.verdict][0]} />` },
      { key: "predicted", title: "Predicted", show: (row) => fixed(row.predicted, 1), value: (row) => row.predicted },
      { key: "observed", title: "Observed", show: (row) => count(row.observed), value: (row) => row.observed },
      { key: "matched", title: "Rows", show: (row) => compact(row.matched), value: (row) => row.matched },
    ]} />`;
}

const Unknown = ({ data }) => html`
  <${Table} rows=${data.features} sort=${["share", true]} of="features"
    caption="Values that no row of training had, as a share of all values scored. ${plural(data.rows, "row")} since the start."
    empty="No feature has a vocabulary." columns=${[
      { key: "name", title: "Feature", left: true, show: (row) => row.name, value: (row) => row.name },
      { key: "kind", title: "Kind", left: true, show: (row) => row.kind, value: (row) => row.kind },
      { key: "share", title: "Share", show: (row) => (row.share === null ? "–" : `${row.exact ? "" : "≥ "}${percent(row.share, 2)}`), value: (row) => row.share },
      { key: "bar", title: "Of all", left: true, show: (row) => html`<${Bar} part=${row.share ?? 0} kind="loss" />` },
      { key: "unknown", title: "Unknown", show: (row) => count(row.unknown), value: (row) => row.unknown },
      { key: "known", title: "Words known", show: (row) => count(row.num_words), value: (row) => row.num_words },
    ]} />`;

function Scores({ data }) {
  const rows = data.domains.filter(({ reference, rows: scored }) => reference !== null && scored > 0);
  if (!rows.length) return html`<${Empty} title="Nothing to compare"><p>${data.has_reference ? "No row of a domain with a training figure was scored yet." : "The bundle does not say what the mean score was in training. Versions that an update wrote do."}</p><//>`;
  const of = rows.map((row) => ({ ...row, change: row.mean_score - row.reference }));
  const widest = Math.max(...of.map(({ change }) => Math.abs(change)), 0.001);
  return html`<${Table} rows=${of} search=${(row) => row.name} of="domains" sort=${["change", true]}
    caption="Mean of the probabilities answered, against the mean on the rows that the version was judged on."
    columns=${[
      { key: "name", title: "Domain", left: true, show: (row) => row.name, value: (row) => row.name },
      { key: "now", title: "Now", show: (row) => percent(row.mean_score, 2), value: (row) => row.mean_score },
      { key: "reference", title: "Then", show: (row) => percent(row.reference, 2), value: (row) => row.reference },
      { key: "change", title: "Change in points", show: (row) => fixed(100 * row.change), value: (row) => row.change },
      { key: "bar", title: "Lower or higher", left: true, show: (row) => html`<${Bar} part=${row.change / widest} middle=${true} />` },
      { key: "rows", title: "Rows", show: (row) => compact(row.rows), value: (row) => row.rows },
    ]} />`;
}
