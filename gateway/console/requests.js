// The requests that are kept, sifted by what one looks for; how they are spread over time, and which
// was the slowest of each bucket. What is asked for stands in the address, so that links lead here.

import { Away, Refused, requests } from "./api.js";
import { badge, h, keyed, panel, put, say, show, table } from "./dom.js";
import { NONE, address, clock, count, percent, seconds, share } from "./format.js";

const EVERY_MS = 2000;
const ID = /^\S{16,}$/;
const TYPING_MS = 300;
const OUTCOMES = [
  ["", "any"], ["missed", "broke a promise"], ["ok", "ok"], ["late", "late"], ["failed", "failed"], ["shed", "shed"],
  ["limited", "over a limit"], ["refused", "refused"], ["cancelled", "client left"],
];
const TOOK = [["", "any time"], ["0.1", "over 100 ms"], ["0.5", "over 500 ms"], ["1", "over 1 s"], ["2", "over 2 s"], ["5", "over 5 s"], ["20", "over 20 s"]];
const CLOCKS = [["", "first token"], ["whole", "whole"]];
const ORDERS = [["", "latest first"], ["slowest", "slowest first"]];

// A status as a word and a tone. 499: the client left, which is nobody's fault.
export function ended(request) {
  if (request.outcome === "cancelled" || request.error === "client_cancelled" || !request.status) return ["client left", "wait"];
  const tone = request.status >= 500 || (request.error && request.status === 200) ? "bad" : request.status >= 400 || request.outcome === "late" ? "warn" : "ok";
  const word = request.error && request.error !== String(request.status) ? `${request.status} ${request.error.replaceAll("_", " ")}` : String(request.status);
  return [request.outcome === "late" ? `${word} late` : word, tone];
}

export function requestRows() {
  const empty = h("p", { class: "empty" });
  const grid = table("Requests", [
    ["Came", "num"], ["Request", "name"], ["Tier", "tier"], ["Replica", "names extra"], ["Prompt", "num extra"], ["Cached", "num"],
    ["Answer", "num extra"], ["First token", "num"], ["Foreseen", "num extra"], ["Whole", "num"], ["Ended", "end"],
  ]);
  const scroll = h("div", { class: "scroll" }, grid.node);
  const rows = keyed(grid.body, (one) => `${one.id} ${one.at}`, (one) => {
    const [came, model, tier, where, prompt, cached, answer, ttft, foreseen, whole] = Array.from({ length: 10 }, () => h("span"));
    const outcome = badge();
    const link = h("a", { class: "mono id", href: `#request/${encodeURIComponent(one.id)}`, title: one.id }, one.id.replace(/^req_/, ""));
    put(model, "class", "sub");
    return {
      node: grid.row(came, h("span", {}, link, model), tier, where, prompt, cached, answer, ttft, foreseen, whole, outcome.node),
      update(request) {
        say(came, clock(request.at));
        say(model, [request.tenant, request.arm === "candidate" ? "candidate" : "", request.model].filter(Boolean).join(" · "));
        put(model, "title", model.textContent);
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
        put(outcome.node, "title", outcome.node.textContent);
      },
    };
  });
  return {
    node: h("div", {}, empty, scroll),
    update(found, none) {
      show(empty, !found.length);
      show(scroll, found.length > 0);
      say(empty, none);
      rows(found);
    },
  };
}

export const noRequest = (told) => (told.kept_traces ? "No request has come yet." : "The policy keeps no traces (tracing.keep is 0), so that there is nothing to list.");

export function requestsView(query) {
  const made = panel("latest", "Requests");
  const list = requestRows();
  const spread = buckets();
  const form = sieve(() => look(true));
  const [failed, state] = [h("p", { class: "failed", role: "alert" }), h("p", { class: "note found", role: "status" })];
  made.node.append(form.node, spread.node, state, failed, list.node);
  form.set(query);
  for (const one of [failed, list.node]) show(one, false);
  let told = null;
  let askedAt = -EVERY_MS;
  let asking = null;
  async function look(now) {
    const asked = form.asked();
    if (asking === asked || (!now && performance.now() - askedAt < EVERY_MS)) return;
    asking = asked;
    try {
      const found = await requests(asked);
      if (asked === form.asked()) draw(found); // or another was asked for meanwhile
      show(failed, false);
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      say(failed, error instanceof Refused && error.status !== 401 ? error.message : "");
      show(failed, Boolean(failed.textContent));
    } finally {
      asking = null;
      askedAt = performance.now();
      if (asked !== form.asked()) look(true);
    }
  }
  function draw(found) {
    form.offer(found.choices);
    show(list.node, true);
    spread.update(found);
    const of = found.processes.of > 1 ? `, by ${count(found.processes.asked)} of ${count(found.processes.of)} gateway processes` : "";
    const more = found.requests.length < found.matched ? `${count(found.requests.length)} of ${count(found.matched)} shown` : `${count(found.matched)} found`;
    const older = found.older ? ` and ${count(found.older)} before them that failed, were late or a candidate's` : "";
    say(state, found.kept ? `${more}, among the latest ${count(found.kept - found.older)} that are kept${older}${of}` : "");
    list.update(found.requests, found.kept ? "None of those that are kept is like that." : noRequest(told));
  }
  return {
    node: h("div", { class: "view" }, h("h1", { class: "unseen" }, "Requests"), made.node),
    go(asked) {
      form.set(asked);
      look(true);
    },
    update(seen) {
      told = seen;
      look(false);
    },
  };
}

// ---- what is looked for -------------------------------------------------------------------------

function sieve(changed) {
  const select = (name, label, options) => {
    const node = h("select", { id: `sift-${name}`, name, on: { change: () => moved() } }, options.map(([value, said]) => h("option", { value }, said)));
    return { name, node, field: h("div", { class: `field ${name}` }, h("label", { for: node.id }, label), node) };
  };
  // What there is to choose among is told with the first answer.
  const free = ["tenant", "model", "tier", "replica", "arm"].map((name) => select(name, name[0].toUpperCase() + name.slice(1), [["", "any"]]));
  const fixed = [select("outcome", "Ended", OUTCOMES), select("over_s", "Took", TOOK), select("clock", "Time of", CLOCKS), select("order", "Order", ORDERS)];
  const text = h("input", { id: "find", type: "search", placeholder: "part of an id, a name, an error", spellcheck: "false", autocomplete: "off", maxlength: "200", on: { input: () => { clearTimeout(typing); typing = setTimeout(moved, TYPING_MS); } } });
  const every = [...free, ...fixed];
  const go = h("button", { type: "submit", title: "The trace of this id, in whichever process it is" }, "Open");
  const clear = h("button", { type: "button", on: { click: () => { set(""); moved(); } } }, "Clear");
  const node = h("form", { class: "sieve", role: "search", on: { submit: open } },
    h("div", { class: "field text" }, h("label", { for: "find" }, "Search"), text), every.map((one) => one.field),
    h("div", { class: "go" }, go, clear));
  for (const one of free) show(one.field, false);
  let typing = 0;
  let bounds = ""; // of a bucket, which no select has
  function values() {
    const found = new URLSearchParams();
    if (text.value.trim()) found.set("text", text.value.trim());
    for (const one of every) if (one.node.value) found.set(one.name, one.node.value);
    if (bounds) found.set("under_s", bounds);
    return found;
  }
  // An id leads to its trace, in whichever process it is; what is none is looked for.
  function open(event) {
    event.preventDefault();
    if (ID.test(text.value.trim())) location.hash = `#request/${encodeURIComponent(text.value.trim())}`;
    else moved();
  }
  function set(query) {
    const asked = new URLSearchParams(query);
    text.value = asked.get("text") || "";
    bounds = asked.get("under_s") || "";
    for (const one of every) {
      const wanted = asked.get(one.name) || "";
      if (![...one.node.options].some((option) => option.value === wanted)) one.node.append(h("option", { value: wanted }, wanted));
      one.node.value = wanted;
    }
    tell();
  }
  function tell() {
    show(clear, Boolean(String(values())));
    show(go, ID.test(text.value.trim()));
  }
  function moved() {
    const asked = String(values());
    history.replaceState(null, "", asked ? `#requests?${asked}` : "#requests");
    tell();
    changed();
  }
  return {
    node,
    set,
    asked: () => String(values()),
    // Fields of which there is but one value are no choice.
    offer(choices) {
      for (const one of free) {
        const chosen = one.node.value;
        const names = [...new Set([...choices[one.name], ...(chosen ? [chosen] : [])])];
        show(one.field, names.length > 1 || Boolean(chosen));
        if (names.join("\n") === [...one.node.options].slice(1).map((option) => option.value).join("\n")) continue;
        one.node.replaceChildren(h("option", { value: "" }, "any"), ...names.map((name) => h("option", { value: name }, one.name === "replica" ? address(name) : name)));
        one.node.value = chosen;
      }
    },
  };
}

// ---- how they are spread over time --------------------------------------------------------------

// A bar for each bucket: it leads to the slowest request of it, which has a trace.
function buckets() {
  const list = h("ol", { class: "buckets" });
  const title = h("h3");
  const node = h("section", { class: "spread" }, title, list);
  show(node, false);
  const bars = keyed(list, (one) => String(one.under_s), () => {
    const [number, bar, label] = [h("b"), h("i", { "aria-hidden": "true" }), h("span")];
    const link = h("a", {}, number, bar, label);
    const part = h("li", {}, link);
    return {
      node: part,
      update(one) {
        const upto = one.under_s === null ? `over ${seconds(one.over_s)}` : `≤ ${seconds(one.under_s).replace(/\.0+(?= )/, "")}`;
        say(number, one.count ? count(one.count) : "");
        say(label, upto);
        put(part, "data-none", one.count ? null : "");
        put(part, "data-tone", one.missed ? "warn" : null);
        bar.style.setProperty("--part", String(one.part));
        put(link, "href", one.slowest ? `#request/${encodeURIComponent(one.slowest)}` : null);
        const broke = one.missed ? `, ${count(one.missed)} broke a promise` : "";
        const said = `${count(one.count)} requests ${upto}${broke}${one.slowest ? `; the slowest took ${seconds(one.slowest_s)}: open its trace` : ""}`;
        put(link, "title", said);
        put(link, "aria-label", said);
      },
    };
  });
  return {
    node,
    update(found) {
      const counts = found.buckets.map((one) => one.count);
      const most = Math.max(...counts, 1);
      show(node, counts.some(Boolean));
      say(title, `${found.clock === "whole" ? "From the request to the end of its answer" : "From the request to its first token"}: requests by time. A bar leads to the trace of its slowest.`);
      bars(found.buckets.map((one, at) => ({ ...one, over_s: at ? found.buckets[at - 1].under_s : 0, part: one.count / most })));
    },
  };
}
