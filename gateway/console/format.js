// Numbers as people read them. What is not known is a dash.

export const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(2)} G`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(2)} M`;
  if (size >= 1e5) return `${(value / 1e3).toFixed(0)} k`;
  return Math.round(value).toLocaleString("en-US").replaceAll(",", "\u202f");
}

export function rate(value) {
  if (!known(value)) return NONE;
  return value >= 100 ? count(value) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function percent(share, digits = 1) {
  if (!known(share)) return NONE;
  const value = 100 * share;
  return `${Number(value.toFixed(digits))} %`;
}

export function seconds(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size < 0.0095) return `${(1000 * value).toFixed(1)} ms`;
  if (size < 0.9995) return `${(1000 * value).toFixed(0)} ms`;
  if (size < 60) return `${value.toFixed(2)} s`;
  return span(value);
}

export function span(value) {
  if (!known(value)) return NONE;
  const s = Math.max(0, Math.round(value));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function clock(at) {
  return known(at) ? new Date(1000 * at).toLocaleTimeString("en-GB") : NONE;
}

export function day(at) {
  return known(at) ? new Date(1000 * at).toISOString().slice(0, 10) : NONE;
}

export function times(factor) {
  return known(factor) ? `×${factor.toFixed(2)}` : NONE;
}

export function address(url) {
  return typeof url === "string" ? url.replace(/^https?:\/\//, "") : NONE;
}

export function fingerprint(root) {
  return root ? `fp_${root.slice(0, 12)}` : NONE;
}

// Of a share that was promised: below 95 % it warns, below 80 % it alarms.
export const toneOf = (kept) => (!known(kept) ? null : kept >= 0.95 ? "ok" : kept >= 0.8 ? "warn" : "bad");

// Of what nobody told there is no share, which is not a share of 0.
export const share = (part, whole) => (known(part) && whole > 0 ? part / whole : null);
