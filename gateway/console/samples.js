// The last minutes as samples of totals: differences of them are what is shown over time.

export const SPAN_S = 300;
const SMOOTH_S = 5; // over which a rate is taken
const GAP_S = 4; // without a sample: nothing is known of what was between

export class Samples {
  constructor() {
    this.list = [];
    this.process = null;
  }

  // Where to go on from; all again when another process answers.
  get since() {
    return this.list.length ? this.list[this.list.length - 1].at : 0;
  }

  add(process, samples) {
    // Another of several processes behind one port has totals of its own: all of its past is asked
    // for next, in place of ours. One that was started anew goes on behind ours, with a gap.
    const another = this.process !== null && process.id !== this.process;
    this.process = process.id;
    if (another && process.of > 1) {
      this.list = [];
      return;
    }
    const since = this.since;
    this.list.push(...samples.filter((one) => one.at > since));
    const oldest = this.since - SPAN_S;
    while (this.list.length && this.list[0].at < oldest) this.list.shift();
  }

  // [[moment, value]] of what read(newer, older, seconds) makes of samples SMOOTH_S apart; null
  // where it cannot be known.
  over(read, smooth = SMOOTH_S) {
    const points = [];
    let from = 0;
    for (let at = 0; at < this.list.length; at += 1) {
      const newer = this.list[at];
      if (at && broken(this.list[at - 1], newer)) {
        points.push([newer.at, null]);
        from = at;
      }
      while (newer.at - this.list[from].at > smooth + 0.5) from += 1;
      const older = this.list[from];
      if (newer !== older) points.push([newer.at, read(newer, older, newer.at - older.at)]);
    }
    return points;
  }

  // The same for the last `span_s` as a whole; null where there is too little.
  last(span_s, read) {
    const end = this.list.length - 1;
    if (end < 1) return null;
    let at = end;
    while (at > 0 && this.list[end].at - this.list[at - 1].at <= span_s && !broken(this.list[at - 1], this.list[at])) at -= 1;
    if (at === end) return null;
    const [newer, older] = [this.list[end], this.list[at]];
    return read(newer, older, newer.at - older.at);
  }
}

function broken(older, newer) {
  return newer.at - older.at > GAP_S || total(newer, "admitted") < total(older, "admitted") || newer.prompt_tokens < older.prompt_tokens;
}

export function total(sample, name, tier = null) {
  if (tier !== null) return sample.tiers[tier]?.[name] ?? 0;
  return Object.values(sample.tiers).reduce((sum, one) => sum + one[name], 0);
}

const grew = (newer, older, name, tier) => total(newer, name, tier) - total(older, name, tier);

// Readers for `over` and `last`.
export const perSecond = (name, tier = null) => (newer, older, s) => grew(newer, older, name, tier) / s;

export const shareOf = (good, bad, tier = null) => (newer, older) => {
  const [yes, no] = [grew(newer, older, good, tier), grew(newer, older, bad, tier)];
  return yes + no > 0 ? yes / (yes + no) : null;
};

export const tokensPerSecond = (name) => (newer, older, s) => (newer[name] - older[name]) / s;

export const tokenShare = (part, whole) => (newer, older) => {
  const all = newer[whole] - older[whole];
  return all > 0 ? (newer[part] - older[part]) / all : null;
};
