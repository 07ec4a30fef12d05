// Requests one by one: what each came to, where its time went, and why it went where it went.

import { Away, Refused, receipt, trace } from "./api.js";
import { badge, h, keyed, panel, put, say, show, table } from "./dom.js";
import { legend, stack, waterfall } from "./draw.js";
import { NONE, address, clock, count, percent, seconds, share, times } from "./format.js";

// A status as a word and a tone. 499: the client left, which is nobody's fault.
function ended(request) {
  if (request.error === "client_cancelled" || !request.status) return ["client left", "wait"];
  const tone = request.status >= 500 || (request.error && request.status === 200) ? "bad" : request.status >= 400 ? "warn" : "ok";
  return [request.error && request.error !== String(request.status) ? `${request.status} ${request.error.replaceAll("_", " ")}` : String(request.status), tone];
}

export function requestRows() {
  const empty = h("p", { class: "empty" });
  const grid = table("Requests, the latest first", [
    ["Came", "num"], ["Request", "name"], ["Tier", "tier"], ["Replica", "names extra"], ["Prompt", "num extra"], ["Cached", "num"],
    ["Answer", "num extra"], ["First token", "num"], ["Foreseen", "num extra"], ["Whole", "num"], ["Ended", "end"],
  ]);
  const scroll = h("div", { class: "scroll" }, grid.node);
  const rows = keyed(grid.body, (one) => one.id, (one) => {
    const [came, model, tier, where, prompt, cached, answer, ttft, foreseen, whole] = Array.from({ length: 10 }, () => h("span"));
    const outcome = badge();
    const link = h("a", { class: "mono id", href: `#request/${encodeURIComponent(one.id)}`, title: one.id }, one.id.replace(/^req_/, ""));
    put(model, "class", "sub");
    return {
      node: grid.row(came, h("span", {}, link, model), tier, where, prompt, cached, answer, ttft, foreseen, whole, outcome.node),
      update(request) {
        say(came, clock(request.at));
        say(model, [request.model, request.arm === "candidate" ? "candidate" : "", request.tenant].filter(Boolean).join(" · "));
        say(tier, request.tier || NONE);
        say(where, address(request.replica));
        put(where, "title", request.replica);
        say(prompt, count(request.prompt_tokens));
        say(cached, percent(share(request.cached_tokens, request.prompt_tokens), 0));
        say(answer, count(request.answer_tokens));
        say(ttft, seconds(request.ttft_s));
        say(foreseen, seconds(request.foreseen_ttft_s));
        say(whole, seconds(request.e2e_s));
        const [word, tone] = ended(request);
        outcome.update(request.attempts > 1 ? `${word}, ${request.attempts} tries` : word, tone);
      },
    };
  });
  return {
    node: h("div", {}, empty, scroll),
    update(requests, told) {
      show(empty, !requests.length);
      show(scroll, requests.length > 0);
      say(empty, told.kept_traces ? "No request has come yet." : "The policy keeps no traces (tracing.keep is 0), so that there is nothing to list.");
      rows(requests);
    },
  };
}

export function requestsView() {
  const made = panel("latest", "Requests");
  const list = requestRows();
  const field = h("input", { id: "find", placeholder: "id of a request, trace, receipt or answer", spellcheck: "false", autocomplete: "off" });
  const find = (event) => {
    event.preventDefault();
    if (field.value.trim()) location.hash = `#request/${encodeURIComponent(field.value.trim())}`;
  };
  made.head.append(
    h("form", { class: "find", on: { submit: find } }, h("label", { for: "find", class: "unseen" }, "Id"), field, h("button", { type: "submit" }, "Open")),
  );
  made.node.append(list.node);
  return {
    node: h("div", { class: "view" }, h("h1", { class: "unseen" }, "Requests"), made.node),
    update(told) {
      const { pid, of, told: answered } = told.process;
      const whose = answered > 1 ? `${answered} of ${of} processes` : `process ${pid} alone`;
      say(made.note, of > answered ? `the latest first, of ${whose}; ids are looked for in all of ${of} that can be asked` : "the latest first");
      list.update(told.requests, told);
    },
  };
}

// ---- one request --------------------------------------------------------------------------------

export function requestView(id) {
  const body = h("div", { class: "view" });
  const node = h("div", { class: "view" }, h("p", { class: "back" }, h("a", { href: "#requests" }, "← Requests")), h("h1", { class: "mono" }, id), body);
  let settled = false;
  let asking = false;
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
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      body.replaceChildren(h("p", { class: "empty" }, error.message));
    } finally {
      asking = false;
    }
  }
  return { node, update: () => { if (!settled && !asking) read(); } };
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
  if (found.keep) fact("Kept because", found.keep);
  made.node.append(facts, waterfall(found.spans));
  return made.node;
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
