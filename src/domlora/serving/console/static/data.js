// Where figures come from: the server that sent this page, or the page itself if it was saved.

import { useEffect, useReducer, useRef, useState } from "preact/hooks";

const saved = document.getElementById("saved");
/** What a saved page holds, by path; null on a server. */
export const recorded = saved ? JSON.parse(saved.textContent) : null;

const patience = 15_000; // milliseconds, then a request is given up
const remembered = 120; // samples of each series

export class Refused extends Error {}

async function ask(path, options) {
  const address = new URL(`../v1/${path}`, document.baseURI);
  let answer;
  try {
    answer = await fetch(address, { ...options, credentials: "same-origin", signal: AbortSignal.timeout(patience) });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? "The server takes too long to answer." : "The server does not answer.");
  }
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused([told?.error ?? `The server answered ${answer.status}.`, told?.next_step].filter(Boolean).join(" "));
  if (told === null) throw new Error("The server's answer is not JSON.");
  return told;
}

/** One of the console's documents. */
export async function read(path) {
  if (!recorded) return ask(`console/${path}`);
  if (path in recorded) return recorded[path];
  throw new Error("The saved page does not hold this.");
}

export const score = (request) =>
  ask("score", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(request) });

/**
 * A document, read again every so many seconds while the page can be seen and nobody has paused it. When a reading
 * fails, the last good one stays, with the error beside it.
 */
export function useData(path, { every = 0, paused = false, then } = {}) {
  const [state, setState] = useState({ data: null, error: null });
  const [turn, again] = useReducer((number) => number + 1, 0);
  const known = useRef(path);
  useEffect(() => {
    let timer = null;
    let over = false;
    let busy = false;
    if (known.current !== path) setState({ data: null, error: null });
    known.current = path;
    const step = async () => {
      timer = null;
      busy = true;
      try {
        const data = await read(path);
        if (over) return;
        then?.(data);
        setState({ data, error: null });
      } catch (error) {
        if (!over) setState((last) => ({ ...last, error }));
      }
      busy = false;
      if (!over && every && !paused && !recorded) timer = setTimeout(wait, 1000 * every);
    };
    const wait = () => (document.hidden ? (timer = null) : step());
    const seen = () => document.hidden || timer || busy || !every || paused || recorded || step();
    document.addEventListener("visibilitychange", seen);
    step();
    return () => {
      over = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [path, every, paused, turn]);
  return { ...state, again };
}

const series = new Map(); // name -> [{ at, ...counters }], since the page was opened

/** Keep a sample of counters that only grow; a server that was started anew starts the series anew. */
export function remember(name, at, counters) {
  const samples = series.get(name) ?? [];
  const last = samples.at(-1);
  if (last && at <= last.at) return;
  if (last && Object.keys(counters).some((key) => counters[key] < last[key])) samples.length = 0;
  samples.push({ at, ...counters });
  if (samples.length > remembered) samples.shift();
  series.set(name, samples);
}

/** What a counter grew by a second, between each two samples. */
export function rates(name, key) {
  const samples = series.get(name) ?? [];
  return samples.slice(1).map((now, n) => (now[key] - samples[n][key]) / (now.at - samples[n].at));
}

/** The mean of ``total / weight`` between each two samples; null where nothing came. */
export function means(name, total, weight) {
  const samples = series.get(name) ?? [];
  return samples.slice(1).map((now, n) => {
    const grown = now[weight] - samples[n][weight];
    return grown ? (now[total] - samples[n][total]) / grown : null;
  });
}
