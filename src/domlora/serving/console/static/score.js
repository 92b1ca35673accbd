// One request, made by hand from the schema's columns, and what its scores are made of.

import { useState } from "preact/hooks";
import { recorded, score, useData } from "console/data.js";
import { percent, plural, signed } from "console/format.js";
import { Bar } from "console/charts.js";
import { Empty, Reading, html } from "console/parts.js";
import { Table } from "console/table.js";

export function Score() {
  const schema = useData("schema");
  if (recorded) return html`<${Empty} title="A saved page cannot score"><p>It holds figures, not the model. Open the console of a running server.</p><//>`;
  return html`<${Reading} from=${schema}>${(data) => html`<${Form} schema=${data} />`}<//>`;
}

function Form({ schema }) {
  const [domain, setDomain] = useState(schema.domains[0] ?? "");
  const [shared, setShared] = useState(() => typical(schema.columns, 0));
  const [varies, setVaries] = useState(() => new Set(schema.columns.filter(({ varies: each }) => each).map(({ name }) => name)));
  const [candidates, setCandidates] = useState(() => [0, 1, 2].map((n) => typical(schema.columns, n)));
  const [state, setState] = useState({ answer: null, error: null, busy: false });
  const own = schema.columns.filter(({ name }) => varies.has(name));
  const common = schema.columns.filter(({ name }) => !varies.has(name));
  const request = () => ({
    domain: domain || null,
    request: filled(common, shared),
    candidates: candidates.map((each) => filled(own, each)),
    explain: true,
  });
  const send = async (event) => {
    event.preventDefault();
    setState((last) => ({ ...last, busy: true }));
    try {
      setState({ answer: await score(request()), error: null, busy: false });
    } catch (error) {
      setState({ answer: null, error, busy: false });
    }
  };
  const move = (name) => setVaries((last) => { const next = new Set(last); if (!next.delete(name)) next.add(name); return next; });
  const put = (n, name, text) => setCandidates((last) => last.map((each, i) => (i === n ? { ...each, [name]: text } : each)));
  return html`
    <form onSubmit=${send} class="score" autocomplete="off">
      <p class="lead">A field left empty is an absent value. A list is written with commas.</p>
      <div class="fields">
        <label class="field"><span>Domain</span>
          <input list="words-of-domain" value=${domain} placeholder="none: the base answers" onInput=${(event) => setDomain(event.target.value)} />
          <${Words} id="words-of-domain" words=${schema.domains} />
          <small>${plural(schema.domains.length, "domain")}; another name gets ${schema.unknown_domain === "base" ? "the base" : schema.unknown_domain}</small>
        </label>
      </div>
      <fieldset>
        <legend>Same for all candidates</legend>
        <div class="fields">
          ${common.map((column) => html`<${Field} key=${column.name} of=${column} value=${shared[column.name] ?? ""} put=${(text) => setShared({ ...shared, [column.name]: text })}
            move=${() => move(column.name)} action="Differs" />`)}
          ${!common.length && html`<p class="quiet">None: every column differs.</p>`}
        </div>
      </fieldset>
      ${candidates.map((candidate, n) => html`
        <fieldset key=${n}>
          <legend>Candidate ${n + 1}</legend>
          <div class="fields">
            ${own.map((column) => html`<${Field} key=${column.name} of=${column} value=${candidate[column.name] ?? ""} put=${(text) => put(n, column.name, text)} prefix="Candidate ${n + 1}, "
              move=${n ? undefined : () => move(column.name)} action="Same for all" />`)}
          </div>
          ${candidates.length > 1 && html`<button type="button" class="quiet" onClick=${() => setCandidates(candidates.filter((_, i) => i !== n))}>Remove candidate ${n + 1}</button>`}
        </fieldset>`)}
      <p class="actions">
        <button type="submit" class="main" disabled=${state.busy}>${state.busy ? "Scoring…" : `Score ${plural(candidates.length, "candidate")}`}</button>
        <button type="button" onClick=${() => setCandidates([...candidates, typical(schema.columns, candidates.length)])}>Add a candidate</button>
      </p>
    </form>
    <div aria-live="polite">
      ${state.error && html`<div class="failure" role="alert"><p><strong>Not scored.</strong> ${state.error.message}</p></div>`}
      ${state.answer && html`<${Answer} answer=${state.answer} names=${candidates.map((each, n) => named(own, each, n))} />`}
    </div>
    <details><summary>The request as JSON</summary><pre tabindex="0"><code>POST /v1/score${"\n"}${JSON.stringify(request(), null, 2)}</code></pre></details>`;
}

function Field({ of: { name, kind, words, num_words }, value, put, move, action, prefix = "" }) {
  const list = words.length > 0 ? `words-of-${name}` : undefined;
  const hint = { number: "a number", list: "values, with commas between" }[kind] ?? (num_words ? `${plural(num_words, "known value")}` : "any value");
  return html`
    <div class="field">
      <label><span><span class="hidden">${prefix}</span>${name}</span>
        <input value=${value} inputmode=${kind === "number" ? "decimal" : undefined} list=${list} onInput=${(event) => put(event.target.value)} />
        ${list && !prefix.startsWith("Candidate 2") && html`<${Words} id=${list} words=${words} />`}
      </label>
      <small>${hint}${move && html` · <button type="button" class="link" aria-label="${action}: ${name}" onClick=${move}>${action}</button>`}</small>
    </div>`;
}

const Words = ({ id, words }) => html`<datalist id=${id}>${words.map((word) => html`<option key=${word} value=${word} />`)}</datalist>`;

function Answer({ answer, names }) {
  const explain = answer.explain ?? {};
  const rows = answer.probability.map((probability, n) => ({
    name: names[n],
    number: n,
    probability,
    base: explain.base_logit?.[n] ?? null,
    adapter: explain.adapter_logit?.[n] ?? null,
    logit: explain.logit?.[n] ?? null,
  }));
  const widest = Math.max(...rows.map(({ adapter }) => Math.abs(adapter ?? 0)), 0.001);
  const [adapter] = Object.values(answer.adapters ?? {});
  return html`
    <${Table} rows=${rows} id=${(row) => row.number} sort=${["probability", true]} columns=${columns(widest)}
      caption="Scores by version ${answer.bundle}${adapter ? `, adapter ${adapter}` : ", no adapter"}. Logit = base + adapter; probability = 1 / (1 + exp(−logit))." />
    ${Object.keys(answer.arms ?? {}).length > 0 && html`<p class="quiet">Arms: ${Object.entries(answer.arms).map(([name, arm]) => `${name} ${arm}`).join(", ")}</p>`}`;
}

const columns = (widest) => [
  { key: "name", title: "Candidate", left: true, show: (row) => row.name, value: (row) => row.number },
  { key: "probability", title: "Probability", show: (row) => percent(row.probability, 2), value: (row) => row.probability },
  { key: "bar", title: "0 to 100 %", left: true, show: (row) => html`<${Bar} part=${row.probability} />` },
  { key: "base", title: "Base logit", show: (row) => signed(row.base, 3), value: (row) => row.base },
  { key: "adapter", title: "Adapter’s share", show: (row) => signed(row.adapter, 3), value: (row) => row.adapter },
  { key: "share", title: "Lowers or raises", left: true, show: (row) => html`<${Bar} part=${(row.adapter ?? 0) / widest} middle=${true} />` },
  { key: "logit", title: "Logit", show: (row) => signed(row.logit, 3), value: (row) => row.logit },
];

/** Something to begin with: words that the model knows, others for each candidate. */
function typical(columns, n) {
  return Object.fromEntries(columns.map(({ name, kind, words }) => [name, kind === "number" ? "" : words[n % words.length] ?? ""]));
}

/** What was typed, as values: numbers as numbers, lists as lists, nothing as absent. */
function filled(columns, typed) {
  return Object.fromEntries(columns.map(({ name, kind }) => [name, value((typed[name] ?? "").trim(), kind)]));
}

function value(text, kind) {
  if (kind === "list") return text ? text.split(",").map((each) => each.trim()) : [];
  if (!text) return null;
  return kind === "number" && Number.isFinite(Number(text)) ? Number(text) : text;
}

const named = (columns, candidate, n) => columns.map(({ name }) => candidate[name]).filter(Boolean).join(", ") || `candidate ${n + 1}`;
