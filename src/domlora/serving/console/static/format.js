// Numbers, times and names as people read them. NaN and null are a dash everywhere.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const count = (value) => (missing(value) ? "–" : whole.format(value));
export const compact = (value) => (missing(value) ? "–" : Math.abs(value) < 10_000 ? whole.format(value) : short.format(value));
export const fixed = (value, digits = 2) => (missing(value) ? "–" : minus(value.toFixed(digits)));
export const signed = (value, digits = 2) => (missing(value) ? "–" : (value > 0 ? "+" : "") + fixed(value, digits));
export const percent = (value, digits = 1) => (missing(value) ? "–" : `${fixed(100 * value, digits)} %`);
export const gain = (value, digits = 1) => (missing(value) ? "–" : `${signed(100 * value, digits)} %`);
export const interval = (low, high, say = gain) => (missing(low) || missing(high) ? "–" : `${say(low)} to ${say(high)}`);

/** A rate per second with as many digits as tell something. */
export function rate(value) {
  if (missing(value)) return "–";
  return `${value >= 100 ? compact(value) : fixed(value, value >= 10 ? 0 : 1)}/s`;
}

export function milliseconds(seconds) {
  if (missing(seconds)) return "–";
  const ms = 1000 * seconds;
  return `${fixed(ms, ms >= 100 ? 0 : ms >= 10 ? 1 : 2)} ms`;
}

/** Seconds since 1970, or a text such as 2026-05-01T08:00:00+00:00, in the reader's time zone. */
export function moment(when) {
  if (missing(when)) return "–";
  const date = new Date(typeof when === "number" ? 1000 * when : when);
  if (Number.isNaN(date.getTime())) return String(when);
  return date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** For an axis: the day, with the time where few days are shown. */
export function day(seconds, span) {
  const parts = span < 3 * 86_400 ? { hour: "2-digit", minute: "2-digit" } : {};
  return new Date(1000 * seconds).toLocaleString("en-GB", { day: "numeric", month: "short", ...parts });
}

export const clock = (seconds) => (missing(seconds) ? "–" : new Date(1000 * seconds).toLocaleTimeString("en-GB"));

/** A length of time in its largest unit. */
export function lasting(seconds) {
  if (missing(seconds)) return "–";
  for (const [size, unit] of [[86_400, "day"], [3_600, "hour"], [60, "minute"]]) {
    if (seconds >= size) return plural(Math.round(seconds / size), unit);
  }
  return plural(Math.round(seconds), "second");
}

export const plural = (number, word, words = `${word}s`) => `${count(number)} ${number === 1 ? word : words}`;

/** A p-value. */
export const small = (value) => (missing(value) ? "–" : value < 0.001 ? "< 0.001" : fixed(value, 3));

/** The start of a long fingerprint. */
export const brief = (text, length = 10) => (text && text.length > length ? `${text.slice(0, length)}…` : text || "–");

const minus = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−"));
