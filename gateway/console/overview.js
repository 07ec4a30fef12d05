// What an operator looks at first: is every tier kept, where does the load go, what is the cache
// worth, what is switched on and by which verdict.

import { badge, h, keyed, meter, panel, put, say, show, table } from "./dom.js";
import { legend, line, stack } from "./draw.js";
import { NONE, address, count, day, fingerprint, percent, rate, seconds, share, span, times, toneOf } from "./format.js";
import { noRequest, requestRows } from "./requests.js";
import { rolloutPanel } from "./rollout.js";
import { perSecond, shareOf, tokenShare, tokensPerSecond, total } from "./samples.js";

const MINUTE_S = 60;

export function overviewView() {
  const whole = [tiles(), tiers(), rolloutPanel(), replicas(), optimizations()];
  const wide = [waterfall(), latest()];
  const slim = [ladder(), ledger()];
  const parts = [...whole, ...wide, ...slim];
  const column = (kind, some) => h("div", { class: `column ${kind}` }, some.map((one) => one.node));
  const node = h("div", { class: "view overview" }, h("h1", { class: "unseen" }, "Overview"), whole.map((one) => one.node), column("wide", wide), column("slim", slim));
  return { node, update: (told, samples) => parts.forEach((one) => one.update(told, samples)) };
}

// ---- the strip on top ---------------------------------------------------------------------------

const TILES = [
  {
    name: "requests", title: "Requests", unit: "a second",
    value: (told, samples) => rate(samples.last(10, perSecond("admitted"))),
    points: (samples) => samples.over(perSecond("admitted")),
  },
  {
    name: "flight", title: "In flight", unit: (told) => `${count(sum(told, "waiting"))} waiting`,
    value: (told) => count(told.in_flight),
    points: (samples) => samples.over((newer) => newer.in_flight, 1),
  },
  {
    name: "goodput", title: "Promises kept", unit: "last minute", most: 1,
    value: (told, samples) => percent(samples.last(MINUTE_S, shareOf("met", "missed"))),
    points: (samples) => samples.over(shareOf("met", "missed"), 10),
  },
  {
    name: "cached", title: "Prompt tokens cached", unit: "last minute", most: 1,
    value: (told, samples) => percent(samples.last(MINUTE_S, tokenShare("cached_tokens", "prompt_tokens"))),
    points: (samples) => samples.over(tokenShare("cached_tokens", "prompt_tokens"), 10),
  },
  {
    name: "answers", title: "Answer tokens", unit: "a second",
    value: (told, samples) => rate(samples.last(10, tokensPerSecond("answer_tokens"))),
    points: (samples) => samples.over(tokensPerSecond("answer_tokens")),
  },
];

const sum = (told, name) => told.tiers.reduce((all, one) => all + (one.now?.[name] ?? 0), 0);

function tiles() {
  const made = TILES.map((tile) => {
    const value = h("b");
    const unit = h("span", { class: "unit" });
    const chart = line(`${tile.title}, last five minutes`);
    const node = h("div", { class: `tile ${tile.name}` }, h("h2", {}, tile.title), h("p", {}, value, " ", unit), chart.node);
    return {
      node,
      update(told, samples) {
        const said = tile.value(told, samples);
        say(value, said);
        say(unit, typeof tile.unit === "function" ? tile.unit(told) : tile.unit);
        chart.update(tile.points(samples), told.at, tile.most, said);
      },
    };
  });
  const node = h("section", { class: "tiles", "aria-label": "Now" }, made.map((one) => one.node));
  return { node, update: (told, samples) => made.forEach((one) => one.update(told, samples)) };
}

// ---- tiers --------------------------------------------------------------------------------------

function tiers() {
  const made = panel("tiers", "Tiers");
  const grid = table("Tiers against their targets", [
    ["Tier", "name"], ["First token", "num two"], ["In time", "bar"], ["Each further", "num two"], ["In pace", "bar"],
    ["Running", "num"], ["Waiting", "num"], ["Turned away", "num"], ["Requests/s", "num"], ["Last 5 min", "spark spare"],
  ]);
  made.node.append(h("div", { class: "scroll" }, grid.node));
  const rows = keyed(grid.body, (one) => one.name, (one) => tierRow(grid, one.name));
  let context = {};
  function tierRow(of, name) {
    const [running, waiting, perS, away] = Array.from({ length: 4 }, () => h("span"));
    const [ttft, tpot] = [promised(name), promised(name)];
    const [gone, goneEver] = [h("b"), h("small")];
    away.append(gone, goneEver);
    put(away, "class", "promised");
    const kept = ["first tokens in time", "tokens in pace"].map((what) => attained(`${name}: ${what}`));
    const chart = line(`${name}: requests a second, last five minutes`, 24);
    const node = of.row(name, ttft.node, kept[0].node, tpot.node, kept[1].node, running, waiting, away, perS, chart.node);
    return {
      node,
      update(tier) {
        const { told, samples } = context;
        const asked = tier.now;
        put(node, "data-idle", asked ? null : "");
        ttft.update(tier.ttft_s, tier.ttft_ms, tier.slowest);
        tpot.update(tier.tpot_s, tier.tpot_ms);
        kept[0].update(tier.ttft_ms === null ? null : { now: samples.last(MINUTE_S, shareOf("in_time", "late", name)), ever: asked && share(asked.in_time, asked.in_time + asked.late) });
        kept[1].update(tier.tpot_ms === null ? null : { now: samples.last(MINUTE_S, shareOf("in_pace", "slow", name)), ever: asked && share(asked.in_pace, asked.in_pace + asked.slow) });
        say(running, asked ? count(asked.running) : NONE);
        say(waiting, asked ? count(asked.waiting) : NONE);
        say(perS, asked ? rate(samples.last(10, perSecond("admitted", name)) ?? 0) : NONE);
        const late = samples.last(MINUTE_S, (newer, older) => total(newer, "shed", name) + total(newer, "limited", name) - total(older, "shed", name) - total(older, "limited", name));
        say(gone, asked ? count(late ?? 0) : NONE);
        say(goneEver, asked ? `${count(asked.shed + asked.limited)} ever` : "");
        put(gone, "data-tone", late ? "warn" : null);
        chart.update(samples.over(perSecond("admitted", name)), told.at);
      },
    };
  }
  return {
    node: made.node,
    update(told, samples) {
      context = { told, samples };
      const idle = told.tiers.filter((one) => !one.now).map((one) => one.name);
      say(made.note, idle.length === told.tiers.length ? "No request yet" : "median / p95, shares and counts of the last minute; beside them, since the start");
      rows(told.tiers);
    },
  };
}

// What came, median and p95, above what is promised.
// It leads to the trace of the slowest of that minute.
function promised(name) {
  const [seen, target] = [h("a"), h("small")];
  return {
    node: h("span", { class: "promised" }, h("b", {}, seen), target),
    update(found, target_ms, slowest) {
      say(seen, found ? `${seconds(found.p50)} / ${seconds(found.p95)}` : NONE);
      put(seen, "href", slowest ? `#request/${encodeURIComponent(slowest)}` : null);
      put(seen, "title", slowest ? `${name}: median / p95 of the last minute; opens the trace of its slowest` : null);
      say(target, target_ms === null ? "no target" : `≤ ${seconds(target_ms / 1000)}`);
    },
  };
}

// A share that was promised, as bar and number.
function attained(label) {
  const bar = meter(label);
  const [value, ever] = [h("b"), h("small")];
  const node = h("span", { class: "attained" }, value, ever, bar.node);
  return {
    node,
    update(found) {
      const seen = found && (found.now ?? found.ever);
      const tone = toneOf(seen);
      say(value, found === null ? "no target" : percent(found.now));
      put(value, "class", found === null ? "none" : null);
      say(ever, found && typeof found.ever === "number" ? percent(found.ever) : "");
      bar.update(seen, tone, percent(seen));
    },
  };
}

// ---- replicas -----------------------------------------------------------------------------------

const SHOWN = 8; // replicas, where there are more

const STATES = { ready: ["Ready", "ok"], starting: ["Starting", "wait"], down: ["Down", "bad"], draining: ["Draining", "warn"], open: ["Circuit open", "bad"], half_open: ["On trial", "warn"] };

function replicas() {
  const made = panel("replicas", "Replicas");
  const grid = table("Replicas with load, cache and rates", [
    ["Replica", "name"], ["State", ""], ["In flight", "num"], ["Busy", "bar"], ["Cache in use", "bar"],
    ["Prefill tok/s", "num"], ["First token", "num"], ["Failed", "num spare tight"], ["Foreseen", "num spare"], ["Serves", "names spare"],
  ]);
  let all = false;
  const more = h("button", { type: "button", class: "more", on: { click: () => { all = !all; update(last); } } });
  made.node.append(h("div", { class: "scroll" }, grid.node), more);
  const rows = keyed(grid.body, (one) => one.url, (one) => {
    const [where, kind, flight, prefill, ttft, failed, error, serves] = Array.from({ length: 8 }, () => h("span"));
    const state = badge();
    const [busy, cache] = [meter(`${one.url} busy`), meter(`${one.url} cache in use`)];
    const [busySaid, cacheSaid] = [h("b"), h("b")];
    put(kind, "class", "sub");
    const node = grid.row(
      h("span", {}, where, kind), state.node, flight, h("span", { class: "attained" }, busySaid, busy.node),
      h("span", { class: "attained" }, cacheSaid, cache.node), prefill, ttft, failed, error, serves,
    );
    return {
      node,
      update(replica) {
        const { rates, load } = replica;
        const [word, tone] = STATES[replica.state] || [replica.state, "warn"];
        say(where, address(replica.url));
        const why = replica.error || (replica.held ? `by hand: ${replica.held}` : null);
        say(kind, why || `${replica.own ? "own worker" : replica.kind}${replica.weight === 1 ? "" : `, weight ${replica.weight}`}`);
        put(kind, "title", why);
        state.update(word, tone);
        const others = replica.elsewhere ? ` + ${count(replica.elsewhere)} elsewhere` : "";
        say(flight, `${count(replica.in_flight)}${others}`);
        const used = load.blocks ? 1 - load.blocks.free / load.blocks.total : null;
        const pinned = load.blocks ? share(load.blocks.in_use, load.blocks.total) : null;
        say(busySaid, rates ? percent(rates.busy, 0) : NONE);
        busy.update(rates ? rates.busy : null, null, rates ? percent(rates.busy, 0) : "not known");
        say(cacheSaid, used === null ? NONE : percent(used, 0));
        cache.update(used, pinned > 0.9 ? "warn" : null, used === null ? "not known" : percent(used, 0));
        say(prefill, rates ? count(rates.prefill_tokens_per_s) : NONE);
        say(ttft, seconds(replica.ttft_s));
        const tried = Object.values(replica.tried).reduce((all, one) => all + one, 0);
        const bad = replica.tried.failed ?? 0;
        say(failed, tried ? `${count(bad)} of ${count(tried)}` : NONE);
        put(failed, "data-tone", share(bad, tried) > 0.01 ? "warn" : null);
        say(error, rates ? `${times(rates.error_factor)}${rates.trusted ? "" : " not trusted"}` : NONE);
        put(error, "data-tone", rates && !rates.trusted ? "warn" : null);
        say(serves, replica.models.join(", ") || NONE);
        put(serves, "title", `${replica.models.join(", ")}${replica.fingerprint ? `, ${replica.fingerprint}` : ""}`);
      },
    };
  });
  let last = null;
  function update(told) {
    last = told;
    const ready = told.replicas.filter((one) => one.state === "ready").length;
    const what = `${count(ready)} of ${count(told.replicas.length)} ready; first token: running mean; failed: of what was sent there, since the start; foreseen: by which factor predictions are off`;
    say(made.note, told.replicas.length ? what : "No replica is known");
    // Those that want a look stand first.
    const some = told.replicas.toSorted((one, other) => (one.state === "ready") - (other.state === "ready"));
    rows(all || some.length <= SHOWN + 2 ? some : some.slice(0, SHOWN));
    show(more, some.length > SHOWN + 2);
    say(more, all ? `Show the first ${SHOWN}` : `Show all ${count(some.length)}`);
  }
  return { node: made.node, update };
}

// ---- the ladder of cached tokens ----------------------------------------------------------------

const RUNGS = [
  ["prompt", "All prompt tokens", null, null],
  ["anywhere", "Known to some replica", "unknown", "nobody is known to have them"],
  ["available", "At one that takes requests", "down", "only others had them"],
  ["captured", "At the chosen one", "load", "others had more, and too much to do"],
  ["delivered", "Found there", "evicted", "given up meanwhile"],
];

function ladder() {
  const made = panel("ladder", "Cached tokens, rung by rung");
  const list = h("ol", { class: "rungs" });
  const rows = RUNGS.map(([name, title, cause, why]) => {
    const [value, lost] = [h("b"), h("small")];
    const bar = meter(title);
    list.append(h("li", {}, h("span", { class: "rung" }, title), value, bar.node, lost));
    return { name, cause, why, value, lost, bar };
  });
  made.node.append(list);
  return {
    node: made.node,
    update(told) {
      const found = told.cached_tokens;
      say(made.note, found.requests ? `${count(found.requests)} answers since the start${found.untold ? `, ${count(found.untold)} more told no count` : ""}` : "No answer has told yet");
      for (const row of rows) {
        const part = share(found[row.name], found.prompt);
        say(row.value, `${percent(part)}`);
        row.bar.update(part, row.name === "delivered" ? "ok" : null, percent(part));
        const gone = row.cause ? share(found[row.cause], found.prompt) : null;
        const more = row.name === "delivered" && found.unforeseen ? `, + ${percent(share(found.unforeseen, found.prompt))}: more than was known` : "";
        say(row.lost, !found.prompt ? "" : row.cause ? `− ${percent(gone)}: ${row.why}${more}` : `${count(found.prompt)} tokens`);
      }
    },
  };
}

// ---- where the time goes ------------------------------------------------------------------------

function waterfall() {
  const made = panel("waterfall", "Where the time goes");
  const empty = h("p", { class: "empty" }, "No request has ended yet.");
  const list = h("ul", { class: "falls" });
  const key = legend();
  made.node.append(empty, list, key.node);
  let most = 1;
  const rows = keyed(list, (one) => one.name, (one) => {
    const value = h("b");
    const bar = stack(`${one.name}: mean seconds by phase`);
    return {
      node: h("li", {}, h("span", { class: "rung" }, one.name), value, bar.node),
      update(tier) {
        say(value, seconds(tier.sum));
        bar.update(tier.phases, most);
      },
    };
  });
  return {
    node: made.node,
    update(told, samples) {
      const found = told.tiers.filter((one) => one.now?.ended).map((one) => meanOf(one, told.phases, samples));
      most = Math.max(...found.map((one) => one.sum), 1e-9);
      show(empty, !found.length);
      show(key.node, found.length > 0);
      say(made.note, found.length ? "of a request, on average: last minute, else since the start" : "");
      rows(found);
      const ended = found.reduce((all, one) => all + one.ended, 0) || 1;
      key.update(told.phases.map((name, at) => {
        const value = found.reduce((all, one) => all + one.phases[at].value * one.ended, 0) / ended;
        return { name, value, said: seconds(value) };
      }));
    },
  };
}

// A tier's mean request by phase: of the last minute, and where none ended then, of all.
function meanOf(tier, names, samples) {
  const read = (newer, older) => {
    const ended = total(newer, "ended", tier.name) - total(older, "ended", tier.name);
    return ended ? { ended, phases: names.map((name) => (total(newer, `${name}_s`, tier.name) - total(older, `${name}_s`, tier.name)) / ended) } : null;
  };
  const ever = { ended: tier.now.ended, phases: names.map((name) => tier.now[`${name}_s`] / tier.now.ended) };
  const { ended, phases } = samples.last(MINUTE_S, read) || ever;
  const told = names.map((name, at) => ({ name, value: Math.max(0, phases[at]), said: seconds(Math.max(0, phases[at])) }));
  return { name: tier.name, ended, phases: told, sum: told.reduce((all, one) => all + one.value, 0) };
}

// ---- the token ledger ---------------------------------------------------------------------------

const STAGES = {
  received: "of prompts, as clients sent them", trimmed: "left out by the gateway", templated: "of prompts, as replicas read them",
  cached: "found by replicas", prefilled: "computed by replicas", drafted: "guessed ahead", accepted: "guessed right",
  emitted: "of answers", billed: "prompts and answers, as told",
};

function ledger() {
  const made = panel("ledger", "Token ledger");
  const list = h("dl", { class: "counts" });
  const values = Object.entries(STAGES).map(([name, what]) => {
    const value = h("dd");
    list.append(h("div", {}, h("dt", {}, name, h("small", {}, ` ${what}`)), value));
    return [name, value];
  });
  const wrong = h("p", { class: "failed" });
  made.node.append(list, wrong);
  return {
    node: made.node,
    update(told) {
      const { stages, checked, violations } = told.tokens;
      for (const [name, value] of values) say(value, count(stages[name]));
      const broken = Object.entries(violations);
      say(made.note, `${count(checked)} requests checked, since the start`);
      say(wrong, broken.map(([name, times]) => `${count(times)}× ${name.replaceAll("_", " ")} does not hold`).join("; "));
      show(wrong, broken.length > 0);
    },
  };
}

// ---- optimizations ------------------------------------------------------------------------------

const TONES = { on: "ok", off: "wait", stale: "warn", quarantined: "bad" };

function optimizations() {
  const made = panel("optimizations", "Optimizations");
  const empty = h("p", { class: "empty" }, "The policy names none: what is served is the baseline.");
  const grid = table("Optimizations and their verdicts", [
    ["Optimization", "name"], ["State", ""], ["Verdict", ""], ["Age", "num"], ["Holds until", "num"], ["Candidate", "mono"], ["What it says", "why"],
  ]);
  const scroll = h("div", { class: "scroll" }, grid.node);
  made.node.append(empty, scroll);
  let at = 0;
  const rows = keyed(grid.body, (one) => one.hypothesis, () => {
    const [name, kind, verdict, age, until, print, why] = Array.from({ length: 7 }, () => h("span"));
    put(kind, "class", "sub");
    const state = badge();
    return {
      node: grid.row(h("span", {}, name, kind), state.node, verdict, age, until, print, why),
      update(one) {
        say(name, one.hypothesis);
        say(kind, `${one.kind_of_change.replaceAll("_", " ")}: ${one.knobs.join(", ")}`);
        state.update(one.enabled && one.state !== "on" ? `${one.state}, served` : one.state, TONES[one.state]);
        say(verdict, one.verdict ? one.verdict.replaceAll("_", " ") : "none");
        say(age, one.made_at === null ? NONE : span(at - one.made_at));
        say(until, day(one.expires_at));
        say(print, fingerprint(one.candidate));
        put(print, "title", one.candidate);
        say(why, one.why || "it speaks of exactly what is served");
      },
    };
  });
  return {
    node: made.node,
    update(told) {
      at = told.at;
      show(empty, !told.optimizations.length);
      show(scroll, told.optimizations.length > 0);
      const free = told.policy.ungated.length ? `ungated, by the policy itself: ${told.policy.ungated.join(", ")}` : "";
      say(made.note, [told.policy.enforce ? `gate: ${told.policy.enforce}` : "", free].filter(Boolean).join(" · "));
      rows(told.optimizations);
    },
  };
}

// ---- the latest requests ------------------------------------------------------------------------

const LATEST = 8;

function latest() {
  const made = panel("latest", "Latest requests");
  const list = requestRows();
  made.head.append(h("a", { href: "#requests" }, "All of them"));
  made.node.append(list.node);
  return { node: made.node, update: (told) => list.update(told.requests.slice(0, LATEST), noRequest(told)) };
}
