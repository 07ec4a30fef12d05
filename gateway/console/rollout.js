// A rollout that is under way, or how the last one ended; and what an operator may do to it.

import { pause, resume, rollBack } from "./api.js";
import { badge, h, keyed, meter, panel, put, say, show, table } from "./dom.js";
import { NONE, address, count, percent, seconds, share, span } from "./format.js";

const RESULTS = { promoted: "ok", "rolled back": "bad", stopped: "warn", refused: "warn" };

export function rolloutPanel() {
  const made = panel("rollout", "Rollout");
  const state = badge();
  made.head.insertBefore(state.node, made.note);
  const why = h("p", { class: "why" });
  const track = h("ol", { class: "track" });
  const facts = h("p", { class: "sub" });
  const [arms, signals] = [armsTable(), signalsTable()];
  const buttons = acts(made.node);
  made.node.append(why, track, facts, h("div", { class: "pair" }, arms.node, signals.node), buttons.node);
  show(made.node, false);
  const steps = keyed(track, (one) => one.name, () => {
    const node = h("li");
    return {
      node,
      update(one) {
        say(node, one.name);
        put(node, "data-state", one.state);
        put(node, "aria-current", one.state === "now" ? "step" : null);
      },
    };
  });
  return {
    node: made.node,
    update(told) {
      const rollout = told.rollout;
      show(made.node, rollout !== null);
      if (rollout === null) return;
      const [word, tone] = wordOf(rollout);
      say(made.node.querySelector("h2"), `Rollout of ${rollout.name}`);
      state.update(word, tone);
      say(made.note, rollout.id);
      say(why, reasonOf(rollout, told.at));
      put(why, "title", why.textContent || null);
      show(why, Boolean(why.textContent));
      steps(stages(rollout));
      say(facts, factsOf(rollout, told.at));
      arms.update(rollout);
      signals.update(rollout.stage ? rollout.stage.signals : []);
      buttons.update(rollout);
    },
  };
}

function wordOf(rollout) {
  if (rollout.ended) return [rollout.blamed ? "rolled back" : "stopped", rollout.blamed ? "bad" : "warn"];
  if (rollout.left) return [rollout.left === "away" ? "taken away" : rollout.left, RESULTS[rollout.left] || "wait"];
  if (rollout.paused) return ["paused", "warn"];
  if (rollout.suspended) return ["suspended: the store is away", "bad"];
  if (!rollout.lease_s) return ["no lease: the baseline serves", "bad"];
  if (!rollout.ready) return ["not ready: the baseline serves", "warn"];
  return [rollout.share ? `${percent(rollout.share)} of sessions` : "shadow", "ok"];
}

function reasonOf(rollout, at) {
  if (rollout.ended) return `${rollout.ended}${rollout.ended_at ? `, ${span(at - rollout.ended_at)} ago` : ""}`;
  if (rollout.left) return `It ended ${span(at - rollout.left_at)} ago.`;
  return rollout.paused ? `Stays at this stage: ${rollout.paused}. Harm still ends it.` : "";
}

function stages(rollout) {
  const over = Boolean(rollout.ended || rollout.left);
  const names = rollout.stage ? ["shadow", ...rollout.stage.steps.map((one) => percent(one)), "promoted"] : [rollout.share ? percent(rollout.share) : "shadow"];
  const at = rollout.left === "promoted" ? names.length - 1 : rollout.stage ? rollout.stage.at : 0;
  return names.map((name, place) => ({
    name,
    state: place < at || rollout.left === "promoted" ? "done" : place > at ? "ahead" : over ? "ended" : "now",
  }));
}

function factsOf(rollout, at) {
  const parts = [];
  const stage = rollout.stage;
  const over = rollout.ended || rollout.left;
  if (stage && !over) {
    parts.push(stage.at === 0 ? `${count(stage.pairs)} of ${count(stage.shadow_pairs)} shadow pairs` : `this step since ${span(at - stage.began_at)}, at least ${span(stage.min_step_s)}`);
  }
  if (!over) parts.push(`lease ${rollout.lease_s.toFixed(1)} s`, `${count(rollout.in_flight)} in flight there`);
  if (rollout.shadowed) parts.push(`${count(rollout.shadowed)} mirrored`);
  for (const one of rollout.replicas) parts.push(`${address(one.url)}${one.fingerprint ? ` ${one.fingerprint}` : ""}`);
  return parts.join(" · ");
}

// ---- both arms ----------------------------------------------------------------------------------

// What of both arms is shown: its name, how it reads, and by which name it is told how far they are
// apart; `better`: which way.
const ROWS = [
  { name: "Requests", read: (arm) => count(arm.requests) },
  { name: "Failed", read: (arm) => (arm.requests ? `${count(arm.failed)} · ${percent(share(arm.failed, arm.requests))}` : NONE), of: "failed", better: -1, unit: points },
  { name: "First token in time", read: (arm) => percent(share(arm.in_time, arm.judged)), of: "in_time", better: 1, unit: points },
  { name: "First token, median", read: (arm) => seconds(arm.ttft_s?.p50), of: "ttft_s", better: -1, unit: seconds },
  { name: "First token, p95", read: (arm) => seconds(arm.ttft_s?.p95) },
  { name: "Each further, median", read: (arm) => seconds(arm.tpot_s?.p50), of: "tpot_s", better: -1, unit: seconds },
  { name: "Guesses accepted", read: (arm) => percent(share(arm.accepted, arm.drafted)), of: "accepted", better: 1, unit: points },
];
const NOBODY = { requests: 0, failed: 0, judged: 0, in_time: 0, accepted: 0, drafted: 0, ttft_s: null, tpot_s: null };

function points(value) {
  return `${(100 * value).toFixed(1)} pp`;
}

function armsTable() {
  const grid = table("Baseline and candidate", [["Live answers", "name"], ["Baseline", "num"], ["Candidate", "num"], ["Apart, with 95 %", "apart"]]);
  const cells = ROWS.map((row) => {
    const [one, other] = [h("span"), h("span")];
    const between = interval(row);
    grid.body.append(grid.row(row.name, one, other, between.node));
    return { row, one, other, between };
  });
  put(grid.node, "class", "kept"); // few columns, which are narrow enough for any screen
  return {
    node: h("div", { class: "scroll" }, grid.node),
    update({ arms, apart }) {
      for (const { row, one, other, between } of cells) {
        say(one, row.read(arms.baseline || NOBODY));
        say(other, row.read(arms.candidate || NOBODY));
        between.update(row.of ? apart?.[row.of] : null);
      }
      put(cells[1].other, "data-tone", arms.candidate && arms.candidate.failed ? "bad" : null);
    },
  };
}

// Candidate less baseline: from where to where it lies with 95 %, beside zero.
function interval(row) {
  const [text, zero, reach, dot] = [h("span"), h("i", { class: "zero" }), h("i", { class: "reach" }), h("i", { class: "dot" })];
  const picture = h("span", { class: "interval", "aria-hidden": "true" }, zero, reach, dot);
  const node = h("span", { class: "between" }, picture, text);
  return {
    node,
    update(found) {
      show(picture, Boolean(found));
      if (!found) {
        say(text, row.of ? "too few yet" : "");
        put(node, "data-tone", null);
        return;
      }
      const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${row.unit(Math.abs(value))}`;
      say(text, `${signed(found.low)} … ${signed(found.high)}`);
      put(node, "title", `candidate less baseline: ${signed(found.at)}, with 95 % from ${signed(found.low)} to ${signed(found.high)}, as if answers were independent`);
      const sure = found.low > 0 ? 1 : found.high < 0 ? -1 : 0;
      put(node, "data-tone", sure === 0 ? null : sure === row.better ? "ok" : "bad");
      const most = Math.max(Math.abs(found.low), Math.abs(found.high), 1e-9);
      const at = (value) => 50 + (50 * value) / most;
      reach.style.left = `${at(found.low)}%`;
      reach.style.width = `${at(found.high) - at(found.low)}%`;
      dot.style.left = `${at(found.at)}%`;
    },
  };
}

// ---- evidence -----------------------------------------------------------------------------------

const DECADES = 4; // of a p-value, that the bar is long

function signalsTable() {
  const grid = table("Signals and how far they are proved", [["Signal", "name"], ["Pairs", "num"], ["Difference", "num"], ["Margin", "num"], ["No harm", "bar"], ["Harm", "bar"]]);
  const rows = keyed(grid.body, (one) => one.signal, (one) => {
    const [pairs, difference, margin, safe, harm] = Array.from({ length: 5 }, () => h("span"));
    const bars = [meter(`${one.signal}: evidence that nothing is lost`), meter(`${one.signal}: evidence of harm`)];
    const node = grid.row(one.signal, pairs, difference, margin, h("span", { class: "attained" }, safe, bars[0].node), h("span", { class: "attained" }, harm, bars[1].node));
    return {
      node,
      update(signal) {
        say(pairs, count(signal.pairs));
        say(difference, percent(signal.difference, 2));
        say(margin, percent(signal.margin, 2));
        say(safe, signal.passed ? "proved" : `p ${signal.p_safe.toPrecision(2)}`);
        say(harm, `p ${signal.p_harmful.toPrecision(2)}`);
        bars[0].update(-Math.log10(Math.max(signal.p_safe, 1e-9)) / DECADES, signal.passed ? "ok" : null, `p ${signal.p_safe}`);
        bars[1].update(-Math.log10(Math.max(signal.p_harmful, 1e-9)) / DECADES, "bad", `p ${signal.p_harmful}`);
      },
    };
  });
  const node = h("div", { class: "scroll" }, grid.node);
  return {
    node,
    update(signals) {
      show(node, signals.length > 0);
      rows(signals);
    },
  };
}

// ---- what may be done ---------------------------------------------------------------------------

function acts(owner) {
  let rollout = null;
  const failed = h("p", { class: "failed", role: "alert" });
  const hold = h("button", { type: "button", on: { click: () => act(() => (rollout.paused ? resume(rollout.id) : pause(rollout.id, "an operator paused it in the console"))) } });
  const back = h("button", { type: "button", class: "danger", on: { click: () => confirmRollBack(rollout, act) } }, "Roll back …");
  const node = h("div", { class: "actions" }, hold, back, failed);
  show(failed, false);
  async function act(ask) {
    for (const one of [hold, back]) one.disabled = true;
    try {
      await ask();
      show(failed, false);
    } catch (error) {
      say(failed, error.message);
      show(failed, true);
    } finally {
      for (const one of [hold, back]) one.disabled = false;
    }
  }
  return {
    node,
    update(told) {
      rollout = told;
      const over = Boolean(told.ended || told.left);
      show(hold, !over);
      show(back, !over);
      say(hold, told.paused ? "Resume" : "Pause");
      put(owner, "data-over", over ? "" : null);
    },
  };
}

function confirmRollBack(rollout, act) {
  const dialog = document.getElementById("ask");
  const why = h("input", { id: "why", maxlength: "500", autocomplete: "off", value: "an operator rolled it back in the console" });
  const send = (event) => {
    event.preventDefault();
    dialog.close();
    act(() => rollBack(rollout.id, why.value.trim() || "an operator rolled it back in the console"));
  };
  dialog.replaceChildren(
    h("form", { method: "dialog", on: { submit: send } },
      h("h2", { id: "ask-title" }, `Roll back ${rollout.name}?`),
      h("p", {}, "Everything goes to the baseline at once, and streams of the candidate end where they are. The candidate is quarantined: it comes back only with a newer verdict."),
      h("label", { for: "why" }, "Why"), why,
      h("div", { class: "actions" },
        h("button", { type: "button", on: { click: () => dialog.close() } }, "Leave it"),
        h("button", { type: "submit", class: "danger strong" }, "Roll back"))),
  );
  dialog.showModal();
}
