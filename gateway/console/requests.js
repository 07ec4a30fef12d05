// Requests one by one: where each went, what was foreseen of it and what came.

import { Away, receipt } from "./api.js";
import { badge, h, keyed, panel, put, say, show, table } from "./dom.js";
import { legend, stack } from "./draw.js";
import { NONE, address, clock, count, percent, seconds, share, times } from "./format.js";

// An outcome is a status, or a word for what went wrong before there was one.
function toneOf(outcome) {
  if (outcome === null || outcome === "left") return "wait";
  return outcome === "200" ? "ok" : outcome.startsWith("4") ? "warn" : "bad";
}

export function receiptRows() {
  const empty = h("p", { class: "empty" }, "No request has come yet.");
  const grid = table("Requests, the latest first", [
    ["Came", "num"], ["Request", "name"], ["Tier", ""], ["Replica", "names"], ["Prompt", "num"], ["Cached", "num"],
    ["First token", "num"], ["Foreseen", "num"], ["Outcome", ""],
  ]);
  const scroll = h("div", { class: "scroll" }, grid.node);
  const rows = keyed(grid.body, (one) => one.id, (one) => {
    const [came, model, tier, where, prompt, cached, ttft, foreseen] = Array.from({ length: 8 }, () => h("span"));
    const outcome = badge();
    const link = h("a", { href: `#request/${encodeURIComponent(one.id)}` }, one.id.replace("rcpt_", ""));
    put(model, "class", "sub");
    return {
      node: grid.row(came, h("span", {}, link, model), tier, where, prompt, cached, ttft, foreseen, outcome.node),
      update(request) {
        say(came, clock(request.at));
        say(model, request.tenant ? `${request.model} · ${request.tenant}` : request.model);
        say(tier, request.tier);
        say(where, address(request.replica));
        say(prompt, count(request.prompt_tokens));
        say(cached, request.cached_tokens === null ? NONE : percent(share(request.cached_tokens, request.prompt_tokens), 0));
        say(ttft, seconds(request.ttft_s));
        say(foreseen, seconds(request.foreseen_ttft_s));
        const more = request.attempts > 1 ? `, ${request.attempts} tries` : "";
        outcome.update(request.outcome === null ? "under way" : `${request.outcome}${more}`, toneOf(request.outcome));
      },
    };
  });
  return {
    node: h("div", {}, empty, scroll),
    update(requests) {
      show(empty, !requests.length);
      show(scroll, requests.length > 0);
      rows(requests);
    },
  };
}

export function requestsView() {
  const made = panel("latest", "Requests");
  const list = receiptRows();
  const field = h("input", { id: "find", placeholder: "rcpt_…", spellcheck: "false", autocomplete: "off" });
  const find = (event) => {
    event.preventDefault();
    if (field.value.trim()) location.hash = `#request/${encodeURIComponent(field.value.trim())}`;
  };
  made.head.append(
    h("form", { class: "find", on: { submit: find } }, h("label", { for: "find", class: "unseen" }, "Receipt"), field, h("button", { type: "submit" }, "Open")),
  );
  made.node.append(list.node);
  return {
    node: h("div", { class: "view" }, h("h1", { class: "unseen" }, "Requests"), made.node),
    update(told) {
      say(made.note, "by their receipts, the latest first");
      list.update(told.receipts);
    },
  };
}

// ---- one request --------------------------------------------------------------------------------

export function requestView(id) {
  const made = panel("receipt", "Receipt");
  const body = h("div");
  made.node.append(body);
  const node = h("div", { class: "view" }, h("p", { class: "back" }, h("a", { href: "#requests" }, "← Requests")), h("h1", { class: "mono" }, id), made.node);
  let drawn = "";
  let asking = false;
  async function read() {
    if (asking) return;
    asking = true;
    try {
      const found = await receipt(id);
      const text = JSON.stringify(found);
      if (text !== drawn) body.replaceChildren(...drawReceipt(found));
      drawn = text;
      say(made.note, found.told_prompt_tokens === null ? "under way" : "");
      settled = found.told_prompt_tokens !== null || found.attempts.length > 0;
    } catch (error) {
      if (!(error instanceof Away) && !drawn) {
        body.replaceChildren(h("p", { class: "empty" }, error.message));
        settled = true;
      }
    } finally {
      asking = false;
    }
  }
  let settled = false;
  return { node, update: () => { if (!settled) read(); } };
}

const COSTS = ["wait", "compute", "decode"];

function drawReceipt(found) {
  const facts = h("dl", { class: "facts" });
  const fact = (name, value) => facts.append(h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  fact("Came", `${clock(found.at)}`);
  fact("Model", found.model);
  fact("Tier", found.tier);
  if (found.tenant) fact("Tenant", found.tenant);
  fact("Prompt tokens", `${count(found.told_prompt_tokens ?? found.prompt_tokens)}${found.exact ? "" : ", by bytes"}`);
  fact("First token", seconds(found.ttft_s));
  fact("Foreseen", `${seconds(found.foreseen_ttft_s)}${found.error_factor ? `, predictions there are off by ${times(found.error_factor)}` : ""}`);
  fact("Attempts", found.attempts.map((one) => `${address(one.url)} ${one.outcome} after ${seconds(one.after_s)}`).join("; ") || "none yet");
  return [facts, ...(found.foreseen ? [cachedOf(found)] : []), ...found.decisions.map(decision)];
}

function cachedOf(found) {
  const seen = found.foreseen;
  const rungs = [["Prompt", seen.prompt], ["Known anywhere", seen.anywhere], ["Where it could be sent", seen.available], ["Where it was sent", seen.captured], ["Found there", found.told_cached_tokens]];
  return h("section", { class: "part" }, h("h3", {}, "Cached tokens"),
    h("ol", { class: "rungs" }, rungs.map(([name, tokens]) => {
      const bar = h("span", { class: "meter", "data-tone": name === "Found there" ? "ok" : null }, h("span"));
      bar.firstChild.style.width = `${100 * (share(tokens ?? 0, seen.prompt) ?? 0)}%`;
      return h("li", {}, h("span", { class: "rung" }, name), h("b", {}, tokens === null ? "not told" : count(tokens)), bar, h("small"));
    })));
}

function decision(made, number) {
  const { ask, options, choice } = made;
  const most = Math.max(...choice.terms.map((one) => one.wait_s + one.compute_s + one.decode_s), 1e-9);
  const parts = (terms) => COSTS.map((name) => ({ name, value: terms[`${name}_s`], said: seconds(terms[`${name}_s`]) }));
  const grid = table(`Decision ${number + 1}`, [["Replica", "name"], ["Cached", "num"], ["Waiting", "num"], ["In flight", "num"], ["Cost", "num"], ["of which wait, compute, decode", "wide"]]);
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
