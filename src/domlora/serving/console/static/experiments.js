// A/B tests: what runs, and what it says so far.

import { useData } from "console/data.js";
import { compact, count, fixed, gain, interval, lasting, moment, percent, plural, small } from "console/format.js";
import { Bands, Bar, Strip, scale } from "console/charts.js";
import { Card, Chip, Empty, Figures, Reading, html } from "console/parts.js";
import { Table } from "console/table.js";

const status = { running: "good", draft: "plain", stopped: "plain" };

export const Experiments = (props) => (props.name ? html`<${Experiment} ...${props} />` : html`<${All} ...${props} />`);

function All({ paused, every }) {
  const all = useData("experiments", { every: 2 * every, paused });
  return html`<${Reading} from=${all}>${({ experiments }) =>
    experiments.length
      ? html`<${Table} caption="Experiments, those that run first" rows=${experiments} columns=${columns} search=${experiments.length > 10 ? (row) => row.name : undefined} of="experiments" />`
      : html`<${Empty} title="No experiment yet"><p>Make one with <code>domlora ab create</code> and start it with <code>domlora ab start</code>; this page shows what it says.</p><//>`}<//>`;
}

const columns = [
  { key: "name", title: "Experiment", left: true, value: (row) => row.name, show: (row) => html`<a href="#/experiments/${encodeURIComponent(row.name)}">${row.name}</a>` },
  { key: "status", title: "Status", left: true, value: (row) => row.status, show: (row) => html`<${Chip} kind=${status[row.status] ?? "plain"}>${row.status}<//>` },
  { key: "arms", title: "Arms", left: true, show: (row) => row.arms.map((arm) => arm.name).join(", ") },
  { key: "share", title: "Share", value: (row) => row.share, show: (row) => percent(row.share, 0), note: "Of the units, now" },
  { key: "primary", title: "Decides by", left: true, show: (row) => row.primary },
  { key: "started", title: "Started", value: (row) => row.started_s, show: (row) => moment(row.started_s) },
  { key: "layer", title: "Layer", left: true, value: (row) => row.layer, show: (row) => row.layer },
];

function Experiment({ name, paused, every }) {
  const one = useData(`experiments/${encodeURIComponent(name)}`, { every: 3 * every, paused });
  return html`
    <p><a href="#/experiments">← All experiments</a></p>
    <h2 class="first">${name}</h2>
    <${Reading} from=${one}>${({ experiment, analysis, reason }) => html`
      <${About} of=${experiment} />
      ${analysis ? html`<${Findings} of=${analysis} experiment=${experiment} />` : html`<${Empty} title="Nothing to say yet"><p>${reason}</p><//>`}`}<//>`;
}

const About = ({ of: { status: now, layer, share, domains, started_s, stopped_s, primary, arms } }) => html`
  <${Figures} of=${[
    ["status", html`<${Chip} kind=${status[now] ?? "plain"}>${now}<//>`],
    ["share of units", percent(share, 0)],
    ["decides by", primary],
    ["domains", domains ? domains.join(", ") : "all"],
    ["started", moment(started_s)],
    stopped_s ? ["stopped", moment(stopped_s)] : ["running for", started_s ? lasting(Date.now() / 1000 - started_s) : "–"],
    ["layer", layer],
  ]} />
  ${!arms.length && html`<p class="quiet">It has no arms.</p>`}`;

function Findings({ of: analysis, experiment }) {
  return html`
    <${Decision} of=${analysis} />
    <${Arms} of=${analysis} arms=${experiment.arms} />
    <${Ratio} of=${analysis.sample_ratio} />
    ${analysis.sample_ratio.passed && html`
      <h2>Lift over time</h2>
      <${Sequence} of=${analysis} />
      <h2>By domain</h2>
      <${Forest} of=${analysis} />
      <h2>All metrics</h2>
      <${Metrics} of=${analysis} />`}`;
}

const Decision = ({ of: { decision: { kind, title, words }, progress, until_s } }) => html`
  <section class="card decision ${kind}" aria-label="Decision">
    <h3>Decision</h3>
    <p class="finding">${title}</p>
    ${words.map((line) => html`<p key=${line}>${line}.</p>`)}
    ${Object.entries(progress).map(([arm, part]) => html`
      <div class="progress" key=${arm}><span>${arm}: ${percent(part, 0)} of the planned information</span><${Bar} part=${part} /></div>`)}
    <p class="quiet">What was shown until ${moment(until_s)}.</p>
  </section>`;

function Arms({ of: { arms, lifts, control, primary }, arms: planned }) {
  const total = planned.reduce((sum, arm) => sum + arm.weight, 0);
  const rows = arms.map((arm) => ({ ...planned.find(({ name }) => name === arm.name), ...arm, lift: lifts.find((lift) => lift.arm === arm.name) }));
  return html`<${Table} caption="Arms. Lift is relative to ${control}, with an interval that holds at all looks together." rows=${rows}
    columns=${[
      { key: "name", title: "Arm", left: true, show: (row) => html`${row.name}${row.name === control && html` <${Chip}>control<//>`}` },
      { key: "serves", title: "Serves", left: true, show: serves },
      { key: "weight", title: "Weight", show: (row) => percent(total ? row.weight / total : null, 0) },
      { key: "units", title: "Units", show: (row) => count(row.units) },
      { key: "rows", title: "Rows", show: (row) => compact(row.rows) },
      { key: "rate", title: names[primary], show: (row) => rated(primary, row.rate) },
      { key: "lift", title: "Lift", show: (row) => gain(row.lift?.value, 2) },
      { key: "interval", title: "Interval", show: (row) => (row.lift ? interval(row.lift.low, row.lift.high) : "–") },
    ]} />`;
}

/** Metrics as people say them. */
const names = { ctr: "Clicks by rows", cvr: "Conversions by clicks", payers: "Units that convert", value: "Value by unit" };
const rated = (metric, value) => (metric === "value" ? fixed(value, 3) : percent(value, 3));

const serves = ({ version, adapters }) => `${version ? `version ${version}` : "the version served"}${adapters === false ? " without adapters" : ""}`;

function Ratio({ of: { passed, p, crossed, held_out, arms } }) {
  const left = [crossed && `${plural(crossed, "unit")} seen in several arms and left out`, held_out && `${plural(held_out, "unit")} held out`].filter(Boolean);
  return html`
    <${Card} title="Sample ratio" class=${passed ? "good" : "bad"}>
      <p><${Chip} kind=${passed ? "good" : "bad"}>${passed ? "as planned" : "not as planned"}<//>
        ${" "}Units came to the arms as ${arms.map((arm) => `${arm.name} ${count(arm.observed)}`).join(", ")}; planned were
        ${" "}${arms.map((arm) => count(Math.round(arm.expected))).join(", ")} (p = ${small(p)}).${left.length > 0 && ` ${left.join(", ")}.`}</p>
    <//>`;
}

function Sequence({ of: { sequence, primary } }) {
  if (!sequence.length) return html`<${Empty} title="No look yet"><p>The first one is complete when its time has passed and every arm has units enough.</p><//>`;
  const last = sequence.map(({ arm, points }) => `${arm} ${gain(points.at(-1)?.value, 2)}`).join(", ");
  return html`
    <figure>
      <${Bands} series=${sequence.map(({ arm, points }) => ({ name: arm, points }))} say=${(value) => gain(value)} when=${moment}
        label="Relative lift of ${primary} over time with a band that holds at any time; at the end ${last}" />
      <figcaption>The band holds at all looks together: you may look at each of them, and stop when it leaves zero out.</figcaption>
    </figure>
    <details>
      <summary>The same as numbers</summary>
      ${sequence.map(({ arm, points }) => html`<${Table} key=${arm} caption="Lift of ${arm} over time" rows=${points.toReversed()} id=${(row) => row.time_s} columns=${[
        { key: "time", title: "Until", left: true, show: (row) => moment(row.time_s) },
        { key: "value", title: "Lift", show: (row) => gain(row.value, 2) },
        { key: "interval", title: "Interval", show: (row) => interval(row.low, row.high) },
      ]} />`)}
    </details>`;
}

function Forest({ of: { domains, metrics, primary } }) {
  if (!domains.length) return html`<${Empty} title="No domain yet"><p>It takes units of every arm in a domain.</p><//>`;
  const several = new Set(domains.map(({ arm }) => arm)).size > 1;
  const whole = metrics.filter(({ metric }) => metric === primary).map((each) => ({ ...each, name: "all domains", all: true, units: each.control_units + each.treatment_units, p: null }));
  const [from, to] = scale([...whole, ...domains]);
  return html`<${Table} rows=${[...whole, ...domains]} id=${(row) => `${row.arm}/${row.name}/${row.all ?? ""}`} search=${domains.length > 15 ? (row) => row.name : undefined} of="lines"
    caption="Lift in each domain, with intervals for one look at the end. Domains are many: p says which ones differ with regard to all of them."
    columns=${[
      { key: "name", title: "Domain", left: true, show: (row) => (row.all ? html`<b>${row.name}</b>` : row.name), value: (row) => row.name },
      ...(several ? [{ key: "arm", title: "Arm", left: true, show: (row) => row.arm, value: (row) => row.arm }] : []),
      { key: "strip", title: `${gain(from, 0)} to ${gain(to, 0)}`, left: true, show: (row) => html`<${Strip} value=${row.value} low=${row.low} high=${row.high} from=${from} to=${to} kind=${kind(row)} />` },
      { key: "lift", title: "Lift", show: (row) => gain(row.value, 2), value: (row) => row.value },
      { key: "interval", title: "Interval", show: (row) => interval(row.low, row.high) },
      { key: "p", title: "p", show: (row) => small(row.p), value: (row) => row.p, note: "With regard to all domains (Benjamini-Hochberg)" },
      { key: "units", title: "Units", show: (row) => compact(row.units), value: (row) => row.units },
    ]} />`;
}

const states = { kept: "good", broken: "bad", open: "plain" };

function Metrics({ of: { metrics, guardrails } }) {
  const rows = metrics.filter(({ control, treatment }) => control || treatment).map((each) => ({ ...each, rail: guardrails.find(({ arm, metric }) => arm === each.arm && metric === each.metric) }));
  return html`<${Table} rows=${rows} id=${(row) => `${row.arm}/${row.metric}`} caption="All domains together, with intervals for one look at the end. A guardrail is kept once a fall beyond its margin is ruled out at all looks together."
    columns=${[
      { key: "metric", title: "Metric", left: true, show: (row) => names[row.metric] },
      { key: "arm", title: "Arm", left: true, show: (row) => row.arm },
      { key: "control", title: "Control", show: (row) => rated(row.metric, row.control) },
      { key: "treatment", title: "Arm’s", show: (row) => rated(row.metric, row.treatment) },
      { key: "lift", title: "Lift", show: (row) => gain(row.lift, 2) },
      { key: "interval", title: "Interval", show: (row) => interval(row.low, row.high) },
      { key: "saved", title: "Variance saved", show: (row) => percent(row.reduction, 0), note: "By what units did before the start" },
      { key: "rail", title: "Guardrail", left: true, show: (row) => (row.rail ? html`<${Chip} kind=${states[row.rail.state]}>${row.rail.state}<//> within ${percent(row.rail.margin, 0)}` : "") },
    ]} />`;
}

const kind = ({ low, high }) => (low > 0 ? "good" : high < 0 ? "bad" : "plain");
