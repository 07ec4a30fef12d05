// What each tenant uses of what is there, and whom promises were broken to. Tenants have names here;
// their keys are known to nobody but themselves.

import { Away, Refused, tenants } from "./api.js";
import { h, keyed, meter, panel, put, say, show, table } from "./dom.js";
import { legend, stack } from "./draw.js";
import { NONE, count, percent, share, toneOf } from "./format.js";

const EVERY_MS = 5000;
const SPANS = [["now", "Last 5 min"], ["ever", "Since the start"]];
const ORDERS = [["computed", "tokens computed"], ["requests", "requests"], ["missed", "promises broken"], ["limited", "refusals by limit"]];
const UNITS = { requests: "requests a minute", tokens: "tokens a minute", budget: "tokens today" };

export function tenantsView() {
  const made = panel("tenants", "Tenants");
  const choice = { span: "now", by: "computed" };
  const spans = h("div", { class: "choice", role: "group", "aria-label": "Time" }, SPANS.map(([name, said]) =>
    h("button", { type: "button", "aria-pressed": String(name === choice.span), on: { click: (event) => { choice.span = name; pressed(event.currentTarget); draw(); } } }, said)));
  const order = h("select", { id: "order-tenants", on: { change: () => { choice.by = order.value; look(true); } } }, ORDERS.map(([value, said]) => h("option", { value }, said)));
  const bar = h("div", { class: "choices" }, spans, h("label", { for: order.id }, "Most first by"), order);
  const [empty, failed] = [h("p", { class: "empty" }, "Nothing is known yet."), h("p", { class: "failed", role: "alert" })];
  const grid = table("Tenants, by what they use", [
    ["Tenant", "name"], ["Requests", "num"], ["Promises kept", "bar"], ["Turned away", "num two"], ["Tokens computed", "bar"],
    ["Cached", "num"], ["Answers", "num spare"], ["Billed", "num"], ["Billed by tier", "wide spare"], ["Limits used", "limits"],
  ]);
  const key = legend();
  const scroll = h("div", { class: "scroll" }, grid.node);
  made.node.append(bar, empty, failed, scroll, key.node);
  for (const one of [failed, scroll]) show(one, false);
  const rows = keyed(grid.body, (one) => one.key, (one) => row(grid, one));
  let found = null;
  let askedAt = -EVERY_MS;
  let asking = false;
  function pressed(button) {
    for (const one of spans.children) put(one, "aria-pressed", String(one === button));
  }
  async function look(now) {
    if (asking || (!now && performance.now() - askedAt < EVERY_MS)) return;
    asking = true;
    const by = choice.by;
    try {
      found = await tenants(by);
      show(failed, false);
      draw();
    } catch (error) {
      if (!(error instanceof Away || error instanceof Refused)) throw error;
      say(failed, error instanceof Refused && error.status !== 401 ? error.message : "");
      show(failed, Boolean(failed.textContent));
    } finally {
      asking = false;
      askedAt = performance.now();
      if (by !== choice.by) look(true);
    }
  }
  function draw() {
    if (!found) return;
    const { span } = choice;
    const all = found.all[span];
    const line = (one, name, kind) => ({ ...one, key: `${kind} ${name}`, name, kind, seen: one[span], all, found });
    const lines = found.tenants.map((one) => line(one, one.name, "one"));
    if (found.others) lines.push(line(found.others, `${count(found.others.tenants)} others`, "rest"));
    if (lines.length > 1) lines.push(line(found.all, "All", "sum"));
    const anybody = found.keys || all.requests > 0;
    show(empty, !anybody);
    show(scroll, anybody);
    say(empty, "No request yet; and the policy names no tenants, so that everybody will be one line here.");
    say(made.note, noteOf(found, all));
    rows(anybody ? lines : []);
    const tiers = Object.entries(all.tiers);
    show(key.node, tiers.length > 0);
    key.update(tiers.map(([name, value]) => ({ name, value, said: `${count(value)} billed`, kind: colour(name, tiers) })));
  }
  return {
    node: h("div", { class: "view" }, h("h1", { class: "unseen" }, "Tenants"), made.node),
    update: () => look(false),
  };
}

function noteOf(found, all) {
  const parts = [`${count(all.requests)} requests, ${count(all.computed)} tokens computed`];
  const { asked, of } = found.processes;
  if (of > 1) parts.push(`of ${count(asked)} of ${count(of)} gateway processes`);
  if (found.share_of > 1) parts.push(`limits: this process's share, one in ${count(found.share_of)}`);
  return parts.join(" · ");
}

// Tiers have colours by their place among all that are there.
const colour = (name, tiers) => `hue-${tiers.findIndex(([one]) => one === name) % 6}`;

function row(grid, first) {
  const [requests, away, cached, answers, billed, sub, broke, computedSaid, keptSaid] = Array.from({ length: 9 }, () => h("span"));
  const name = first.kind === "one" ? h("a", { href: `#requests?tenant=${encodeURIComponent(first.name)}` }, first.name || "Everybody") : h("span", {}, first.name);
  if (first.kind === "one" && !first.name) name.removeAttribute("href");
  const [kept, computed] = [meter(`${first.name}: promises kept`), meter(`${first.name}: share of all tokens computed`)];
  const tiers = stack(`${first.name}: tokens billed by tier`);
  const limits = h("ul", { class: "used" });
  const none = h("span", { class: "sub" });
  put(sub, "class", "sub");
  put(broke, "class", "small");
  const missed = h("a", { class: "small", href: `#requests?outcome=missed${first.name && first.kind === "one" ? `&tenant=${encodeURIComponent(first.name)}` : ""}` });
  const node = grid.row(h("span", {}, name, sub), requests,
    h("span", { class: "attained" }, h("b", {}, keptSaid), missed, kept.node), away,
    h("span", { class: "attained" }, h("b", {}, computedSaid), broke, computed.node), cached, answers, billed, tiers.node, h("span", {}, limits, none));
  put(node, "data-kind", first.kind);
  const bars = keyed(limits, (one) => one.what, (one) => {
    const [what, number] = [h("span"), h("b")];
    const bar = meter(`${first.name}: ${UNITS[one.what]}`);
    return {
      node: h("li", {}, what, number, bar.node),
      update(limit) {
        const used = Math.max(0, limit.limit - limit.left);
        const part = limit.limit > 0 ? used / limit.limit : 1;
        say(number, `${count(used)} of ${count(limit.limit)}`);
        say(what, UNITS[limit.what]);
        bar.update(part, part >= 1 ? "bad" : part >= 0.8 ? "warn" : null, `${count(used)} of ${count(limit.limit)} used`);
      },
    };
  });
  return {
    node,
    update(line) {
      const { seen, all } = line;
      put(node, "data-quiet", seen.requests ? null : "");
      say(sub, subOf(line));
      say(requests, count(seen.requests));
      const held = share(seen.judged - seen.missed, seen.judged);
      say(keptSaid, percent(held));
      say(missed, seen.missed ? `${count(seen.missed)} broken` : "");
      kept.update(held, toneOf(held), percent(held));
      const turned = seen.limited + seen.shed;
      say(away, turned ? [seen.limited ? `${count(seen.limited)} limited` : "", seen.shed ? `${count(seen.shed)} shed` : ""].filter(Boolean).join(", ") : "0");
      put(away, "data-tone", turned ? "warn" : null);
      say(computedSaid, count(seen.computed));
      put(computedSaid, "title", seen.untold_tokens ? `${count(seen.untold_tokens)} of them for answers that were left or cut once they had begun, as foreseen and seen` : null);
      const part = share(seen.computed, all.computed);
      say(broke, part === null || line.kind === "sum" ? "" : percent(part, 0));
      computed.update(line.kind === "sum" ? null : part, null, percent(part));
      say(cached, percent(share(seen.cached_tokens, seen.told_tokens), 0));
      say(answers, count(seen.answer_tokens));
      say(billed, count(seen.billed_tokens));
      const kinds = Object.entries(all.tiers);
      tiers.update(kinds.map(([tier]) => ({ name: tier, value: seen.tiers[tier] ?? 0, said: count(seen.tiers[tier] ?? 0), kind: colour(tier, kinds) })));
      bars(tight(line.limits || []));
      put(limits, "title", (line.limits || []).map((one) => `${UNITS[one.what]}: ${count(one.limit - one.left)} of ${count(one.limit)}`).join("\n"));
      const more = line.kind !== "one" ? "" : line.limits === null ? "not known: the store is away" : line.limits.length ? "" : line.known ? "no limit" : NONE;
      say(none, more);
    },
  };
}

// Of several limits the one that is used most, and what else is half used.
function tight(limits) {
  const used = (one) => 1 - one.left / one.limit;
  const ordered = limits.toSorted((one, other) => used(other) - used(one));
  return ordered.filter((one, at) => at === 0 || used(one) >= 0.5);
}

function subOf(line) {
  if (line.kind !== "one") return "";
  if (!line.known) return line.found.keys ? "in the policy no more" : "the policy names no tenants";
  const parts = [line.tiers.length ? line.tiers.join(", ") : "any tier"];
  if (line.weight !== 1) parts.push(`weight ${line.weight}`);
  return parts.join(" · ");
}
