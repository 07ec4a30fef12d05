// One request: its phases, its trace, why it went where it went; and all of it as a file.

import { Away, Refused, receipt, trace } from "./api.js";
import { badge, h, panel, put, say, table } from "./dom.js";
import { legend, stack, waterfall } from "./draw.js";
import { NONE, address, clock, count, percent, seconds, share, times } from "./format.js";
import { ended } from "./requests.js";

export function requestView(id) {
  const body = h("div", { class: "view" });
  const save = h("button", { type: "button", on: { click: () => download(`headgate-${id}.json`, file) } }, "Download as JSON");
  const node = h("div", { class: "view" },
    h("p", { class: "back" }, h("a", { href: "#requests" }, "← Requests"), save),
    h("h1", { class: "mono" }, id), body);
  let file = null;
  let settled = false;
  let asking = false;
  save.hidden = true;
  async function read() {
    asking = true;
    try {
      const unknown = []; // what the gateway said of what it does not have
      const found = await kept(() => trace(id), unknown);
      const name = found ? found.receipt : id;
      const why = name ? await kept(() => receipt(name), unknown) : null;
      const parts = [found && drawTrace(found), why && drawReceipt(why)].filter(Boolean);
      const none = `Nothing is kept by this id: ${unknown.join("; ")}. A request has a trace once it has ended.`;
      body.replaceChildren(...(parts.length ? parts : [h("p", { class: "empty" }, none)]));
      settled = Boolean(found);
      file = { trace: found, receipt: why };
      save.hidden = !parts.length;
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      body.replaceChildren(h("p", { class: "empty" }, error.message));
    } finally {
      asking = false;
    }
  }
  return { node, update: () => { if (!settled && !asking) read(); } };
}

// What is told here, as a file: for a report of a bug, or for another day, when it is kept no more.
function download(name, told) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(told, null, 2)], { type: "application/json" }));
  h("a", { href: url, download: name.replace(/[^\w.-]+/g, "_").slice(0, 120) }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// What is asked for; null where the gateway has nothing by that id, and why not among the `unknown`.
async function kept(ask, unknown) {
  try {
    return await ask();
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error;
    unknown.push(error.message);
    return null;
  }
}

function drawTrace(found) {
  const made = panel("trace", "Trace");
  say(made.note, found.trace_id);
  const [word, tone] = ended(found);
  const outcome = badge();
  outcome.update(word, tone);
  const facts = h("dl", { class: "facts" });
  const fact = (name, value) => facts.append(h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  fact("Came", clock(found.started_at));
  fact("Ended", outcome.node);
  fact("Model", found.model || NONE);
  fact("Tier", found.tier || NONE);
  fact("Replica", address(found.replica || null));
  if (found.arm) fact("Arm", found.arm);
  fact("First token", seconds(found.ttft_s));
  fact("Whole", seconds(found.e2e_s));
  if (found.tenant) fact("Tenant", found.tenant);
  if (found.prompt_tokens !== null) {
    fact("Prompt", `${count(found.prompt_tokens)} tokens, ${percent(share(found.cached_tokens, found.prompt_tokens), 0)} cached`);
    fact("Answer", `${count(found.answer_tokens)} tokens`);
  }
  if (found.keep) fact("Kept because", found.keep);
  made.node.append(facts, drawPhases(found), waterfall(found.spans));
  return made.node;
}

// Where its time went: phases add up to the whole.
function drawPhases(found) {
  const parts = Object.entries(found.phases).map(([name, value]) => ({ name, value, said: seconds(value) }));
  const [bar, key] = [stack("Where its time went"), legend()];
  bar.update(parts);
  key.update(parts);
  return h("div", { class: "phases" }, bar.node, key.node);
}

const COSTS = ["wait", "compute", "decode"];

function drawReceipt(found) {
  const made = panel("receipt", "Why it went where it went");
  say(made.note, found.id);
  const facts = h("dl", { class: "facts" });
  const fact = (name, value) => facts.append(h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  fact("Prompt tokens", `${count(found.told_prompt_tokens ?? found.prompt_tokens)}${found.exact ? "" : ", by bytes"}`);
  fact("First token, from there", seconds(found.ttft_s));
  fact("Foreseen", seconds(found.foreseen_ttft_s));
  fact("Foreseen there, off by", times(found.error_factor));
  fact("Attempts", found.attempts.map((one) => `${address(one.url)} ${one.outcome}`).join(", ") || NONE);
  made.node.append(facts, ...(found.foreseen ? [cachedOf(found)] : []), ...found.decisions.map(decision));
  return made.node;
}

function cachedOf(found) {
  const seen = found.foreseen;
  const rungs = [["Prompt", seen.prompt], ["Known anywhere", seen.anywhere], ["Where it could be sent", seen.available], ["Where it was sent", seen.captured], ["Found there", found.told_cached_tokens]];
  return h("section", { class: "part" }, h("h3", {}, "Cached tokens"),
    h("ol", { class: "rungs" }, rungs.map(([name, tokens]) => {
      const bar = h("span", { class: "meter", "data-tone": name === "Found there" ? "ok" : null }, h("span"));
      bar.firstChild.style.width = `${100 * (share(tokens ?? 0, seen.prompt) ?? 0)}%`;
      return h("li", {}, h("span", { class: "rung" }, name), h("b", {}, tokens === null ? "not told" : count(tokens)), bar);
    })));
}

function decision(made, number) {
  const { ask, options, choice } = made;
  const most = Math.max(...choice.terms.map((one) => one.wait_s + one.compute_s + one.decode_s), 1e-9);
  const parts = (terms) => COSTS.map((name) => ({ name, value: terms[`${name}_s`], said: seconds(terms[`${name}_s`]) }));
  const grid = table(`Decision ${number + 1}`, [["Replica", "name"], ["Cached", "num"], ["Waiting", "num"], ["In flight", "num"], ["Cost", "num"], ["Wait, compute, decode", "wide"]]);
  options.forEach((option, at) => {
    const terms = choice.terms[at];
    const bar = stack(`${address(option.url)}: cost`);
    bar.update(parts(terms), most);
    const row = grid.row(address(option.url), count(option.cached_tokens), count(option.waiting_tokens), count(option.in_flight), seconds(terms.cost_s), bar.node);
    if (at === choice.at) {
      put(row, "class", "chosen");
      row.firstChild.append(h("span", { class: "badge", "data-tone": "ok" }, "chosen"));
    }
    grid.body.append(row);
  });
  const key = legend();
  key.update(parts(choice.terms[choice.at]));
  return h("section", { class: "part" }, h("h3", {}, `Decision ${number + 1}: ${ask.policy}`),
    h("p", { class: "note" }, `${count(ask.common_tokens)} tokens of the beginning are common; alpha ${ask.alpha}${ask.hint ? `; its session was at ${address(ask.hint)}` : ""}`),
    h("div", { class: "scroll" }, grid.node), key.node);
}
