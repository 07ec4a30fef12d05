// The console's frame: asks the gateway each second, and gives what it says to the view in sight.

import { Away, Refused, adminKey, keepAdminKey, overview } from "./api.js";
import { h, put, say, show } from "./dom.js";
import { clock, seconds, span } from "./format.js";
import { overviewView } from "./overview.js";
import { playgroundView } from "./playground.js";
import { requestView } from "./request.js";
import { requestsView } from "./requests.js";
import { Samples } from "./samples.js";
import { tenantsView } from "./tenants.js";

const EVERY_MS = 1000;
const HIDDEN_MS = 15000;
const AWAY_MS = 1500;
const SLOW_MS = 1500;

const byId = (id) => document.getElementById(id);
const samples = new Samples();
const state = { told: null, seenAt: 0, frozen: false, view: null, process: null, asking: false, took_ms: 0 };

// ---- views --------------------------------------------------------------------------------------

const VIEWS = { overview: overviewView, requests: requestsView, request: requestView, tenants: tenantsView, playground: playgroundView };
const kept = new Map(); // a view keeps what was typed into it

// As it stands where it is no text that was encoded.
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function cut(text, mark) {
  const at = text.indexOf(mark);
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

function turn(moved) {
  const [path, query] = cut(location.hash.slice(1), "?");
  const [asked, ...rest] = path.split("/");
  const name = Object.hasOwn(VIEWS, asked) ? asked : "overview";
  const make = VIEWS[name];
  const key = name === "request" ? `#${path}` : `#${name}`;
  if (!kept.has(key)) {
    if (name === "request") for (const old of [...kept.keys()]) if (old.startsWith("#request/")) kept.delete(old);
    kept.set(key, make(name === "request" ? decoded(rest.join("/")) : query));
  } else if (moved && name === asked) {
    kept.get(key).go?.(query);
  }
  state.view = kept.get(key);
  // Before anything is known nothing is said of it.
  byId("main").replaceChildren(state.told ? state.view.node : h("p", { class: "empty" }, "Nothing is known yet."));
  const shown = name === "request" ? "requests" : name;
  for (const link of document.querySelectorAll("nav a")) put(link, "aria-current", link.dataset.view === shown ? "page" : null);
  document.title = `${shown[0].toUpperCase()}${shown.slice(1)} · Headgate`;
  if (state.told) state.view.update(state.told, samples);
  if (moved) byId("main").focus({ preventScroll: true });
}

// ---- asking -------------------------------------------------------------------------------------

let timer = 0;
async function look() {
  if (state.asking) return;
  clearTimeout(timer);
  state.asking = true;
  let pause_ms = document.hidden ? HIDDEN_MS : EVERY_MS;
  const began = performance.now();
  try {
    const told = await overview(samples.since);
    state.took_ms = performance.now() - began;
    heard(told);
  } catch (error) {
    missed(error);
    if (error instanceof Away) pause_ms = AWAY_MS;
    else if (!(error instanceof Refused)) throw error;
  } finally {
    state.asking = false;
    timer = setTimeout(look, pause_ms);
  }
}

function heard(told) {
  const back = state.process !== null && state.process !== told.process.id;
  state.process = told.process.id;
  samples.add(told.process, told.samples);
  const first = state.told === null;
  state.told = told;
  put(byId("main"), "data-stale", null);
  if (first) turn(false);
  state.seenAt = Date.now();
  const ready = told.replicas.filter((one) => one.state === "ready").length;
  const all = told.replicas.length;
  if (told.draining) health("warn", "Draining");
  else if (!ready) health("bad", `No replica of ${all} is ready`);
  else if (ready < all) health("warn", `${ready} of ${all} replicas ready`);
  else health("ok", all === 1 ? "1 replica ready" : `${all} replicas ready`);
  notice(back && told.process.of === 1 ? "The gateway has been started anew; its totals begin again." : concern(told), back ? "ok" : "warn");
  foot(told);
  if (!state.frozen) state.view.update(told, samples);
}

// What the gateway could not do that was wanted of it.
function concern(told) {
  if (told.policy.refused) return `The policy's last change was not taken: ${told.policy.refused}`;
  if (state.took_ms > SLOW_MS) return `The gateway took ${seconds(state.took_ms / 1000)} to tell this: it, or the way to it, is slow. Figures are as of ${clock(told.at)}.`;
  if (told.rollout_lost) return `A rollout that this gateway cannot follow, so that the baseline serves here: ${told.rollout_lost}`;
  return "";
}

// Figures that nobody tells any more are grey, and it is said of when they are.
const seen = () => (state.told ? ` What you see is of ${clock(state.seenAt / 1000)}, and is not told any more.` : "");

function missed(error) {
  put(byId("main"), "data-stale", state.told ? "" : null);
  if (error instanceof Refused && error.status === 401) {
    health("warn", "A key is needed");
    notice((adminKey() ? "This key is not the one of gateway.admin.key_env." : "This gateway tells its state to whoever has the key of gateway.admin.key_env.") + seen(), "warn");
    askForKey();
    return;
  }
  if (error instanceof Refused) {
    health("bad", "Refused");
    notice(error.code === "admin_off" ? "This gateway has tenants and no gateway.admin.key_env: name a variable with a key there, and the console opens with it." : error.message + seen(), "bad");
    return;
  }
  health("bad", "No answer");
  const ago = state.seenAt ? ` What you see is ${span((Date.now() - state.seenAt) / 1000)} old.` : "";
  notice(`The gateway does not answer.${ago} This page goes on by itself when it is back.`, "bad");
}

function health(tone, text) {
  put(byId("health"), "data-state", tone);
  say(byId("health-text"), text);
}

let noticed = 0;
function notice(text, tone) {
  const node = byId("notice");
  if (!text && node.dataset.tone === "ok" && Date.now() - noticed < 8000) return; // long enough to read
  if (text && node.textContent !== text) noticed = Date.now();
  put(node, "data-tone", tone);
  say(node, text);
  show(node, Boolean(text));
}

function foot(told) {
  const { version, pid, started_at, of, told: answered } = told.process;
  const processes = answered >= of ? `all ${of} processes` : answered > 1 ? `${answered} of ${of} processes` : `process ${pid}, one of ${of}: totals are this one's`;
  const parts = [
    version ? `headgate ${version}` : "headgate",
    of > 1 ? processes : `process ${pid}`,
    `up ${span(told.at - started_at)}`,
    told.policy.file ? `policy ${told.policy.file}, read again ${told.policy.reloads}×` : null,
    `store ${told.state.store}`,
  ];
  say(byId("foot"), parts.filter(Boolean).join("   ·   "));
}

// ---- the key ------------------------------------------------------------------------------------

export function askForKey(asked = false) {
  const dialog = byId("ask");
  if (dialog.open || (!asked && dialog.dataset.left)) return;
  const field = h("input", { type: "password", id: "admin-key", autocomplete: "off", spellcheck: "false", value: "" });
  const close = () => dialog.close();
  const form = h(
    "form", { method: "dialog", on: { submit: (event) => { event.preventDefault(); keepAdminKey(field.value.trim()); close(); } } },
    h("h2", { id: "ask-title" }, "Key"),
    h("p", {}, "The value of the variable that the policy names in gateway.admin.key_env. This tab keeps it until it is closed."),
    h("label", { for: "admin-key" }, "Admin key"), field,
    h("div", { class: "actions" },
      h("button", { type: "button", on: { click: () => { keepAdminKey(""); close(); } } }, "Forget it"),
      h("button", { type: "submit", class: "strong" }, "Use it")),
  );
  dialog.replaceChildren(form);
  dialog.showModal();
}

// ---- tools --------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  put(document.documentElement, "data-theme", name === "auto" ? null : name);
  say(byId("theme"), name[0].toUpperCase() + name.slice(1));
  localStorage.setItem("headgate.theme", name);
}

byId("theme").addEventListener("click", () => {
  const at = THEMES.indexOf(localStorage.getItem("headgate.theme") || "auto");
  theme(THEMES[(at + 1) % THEMES.length]);
});
byId("hold").addEventListener("click", () => {
  state.frozen = !state.frozen;
  put(byId("hold"), "aria-pressed", String(state.frozen));
  say(byId("hold"), state.frozen ? "Frozen" : "Freeze");
});
byId("key").addEventListener("click", () => askForKey(true));
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
byId("ask").addEventListener("close", () => { byId("ask").dataset.left = "1"; }); // not again by itself
addEventListener("hashchange", () => turn(true));

theme(THEMES.includes(localStorage.getItem("headgate.theme")) ? localStorage.getItem("headgate.theme") : "auto");
turn(false);
look();
