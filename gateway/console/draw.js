// Small pictures: lines over time, stacked bars, ladders. Their numbers stand beside them as text.

import { h, put, say, show, svg } from "./dom.js";
import { seconds } from "./format.js";
import { SPAN_S } from "./samples.js";

const WIDTH = 300;
const SHORT_S = 60;

// A line over the last minutes, with its area; a gap where nothing is known.
export function line(label, height = 44) {
  const area = svg("path", { class: "area" });
  const stroke = svg("path", { class: "stroke" });
  const limit = svg("path", { class: "limit" });
  const node = svg(
    "svg",
    { class: "line", viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    area, limit, stroke,
  );
  return {
    node,
    // points: [[moment, value or null]]; most: what the top stands for, at least.
    update(points, now, most = 0, said = "") {
      const values = points.map(([, value]) => value).filter((value) => value !== null);
      const top = Math.max(most, ...values, 1e-9);
      const age = now - (points.find(([, value]) => value !== null) || [now])[0];
      const span = Math.min(SPAN_S, Math.max(SHORT_S, age)); // a young process has less to show
      const x = (at) => WIDTH - ((now - at) / span) * WIDTH;
      const y = (value) => height - 1.5 - (value / top) * (height - 4);
      let path = "";
      let filled = "";
      let begun = null;
      let last = null;
      const close = () => {
        if (begun !== null) filled += `L${last.toFixed(1)} ${height}L${begun.toFixed(1)} ${height}Z`;
        begun = null;
      };
      for (const [at, value] of points) {
        if (value === null) {
          close();
          continue;
        }
        const point = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
        path += `${begun === null ? "M" : "L"}${point}`;
        filled += `${begun === null ? "M" : "L"}${point}`;
        if (begun === null) begun = x(at);
        last = x(at);
      }
      close();
      put(stroke, "d", path);
      put(area, "d", filled);
      put(node, "aria-label", said ? `${label}: ${said}` : label);
    },
  };
}

// One bar of parts: [{name, value, said}]; each part has a class of its own for its colour.
export function stack(label) {
  const node = h("div", { class: "stack", role: "img", "aria-label": label });
  const parts = new Map();
  return {
    node,
    update(items, whole) {
      const sum = whole || items.reduce((all, one) => all + one.value, 0) || 1;
      for (const one of items) {
        let part = parts.get(one.name);
        if (!part) {
          part = h("span");
          parts.set(one.name, part);
          node.append(part);
        }
        put(part, "class", `part ${one.kind || one.name}`);
        part.style.width = `${(100 * one.value) / sum}%`;
        show(part, one.value > 0);
        put(part, "title", `${one.name.replaceAll("_", " ")}: ${one.said}`);
      }
      const told = items.filter((one) => one.value > 0).map((one) => `${one.name.replaceAll("_", " ")} ${one.said}`);
      put(node, "aria-label", `${label}: ${told.join(", ") || "nothing yet"}`);
    },
  };
}

export function legend() {
  const node = h("ul", { class: "legend" });
  const parts = new Map();
  return {
    node,
    update(items) {
      for (const one of items) {
        let part = parts.get(one.name);
        if (!part) {
          part = { value: h("b"), key: h("i", { "aria-hidden": "true" }), item: null };
          part.item = h("li", {}, part.key, h("span", {}, one.name.replaceAll("_", " ")), part.value);
          parts.set(one.name, part);
          node.append(part.item);
        }
        put(part.key, "class", `key ${one.kind || one.name}`);
        say(part.value, one.said);
        put(part.item, "data-none", one.value > 0 ? null : "");
      }
    },
  };
}

// One trace: each span where it lies in time, below the one that it is a part of.
export function waterfall(spans) {
  const begin = Math.min(...spans.map((one) => one.start_s));
  const whole = Math.max(...spans.map((one) => one.end_s)) - begin || 1e-9;
  const at = (moment) => `${(100 * Math.min(1, Math.max(0, moment - begin) / whole)).toFixed(3)}%`;
  const rows = inOrder(spans).map(({ span: one, depth }) => {
    const took = one.end_s - one.start_s;
    const bar = h("i", { class: `bar-of ${one.status === "ERROR" ? "bad" : one.service.includes("runtime") ? "runtime" : "gateway-part"}` });
    bar.style.left = at(one.start_s);
    bar.style.width = `max(2px, ${((100 * took) / whole).toFixed(3)}%)`;
    const marks = one.events.slice(0, EVENTS).map((event) => {
      const mark = h("i", { class: "event", title: `${event.name} after ${seconds(event.at_s - begin)}` });
      mark.style.left = at(event.at_s);
      return mark;
    });
    const name = h("span", { class: "span-name" }, one.name);
    name.style.paddingInlineStart = `${depth * 14}px`;
    const facts = Object.entries(one.attributes).map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))));
    const events = one.events.slice(0, EVENTS).map((event) => h("div", {}, h("dt", {}, event.name), h("dd", {}, `after ${seconds(event.at_s - begin)}`)));
    const head = h("summary", {}, name, h("span", { class: "span-lane" }, bar, marks), h("b", {}, seconds(took)));
    return h("details", { class: "span" }, head, h("dl", { class: "facts" }, h("div", {}, h("dt", {}, "service"), h("dd", {}, one.service)), h("div", {}, h("dt", {}, "begins after"), h("dd", {}, seconds(one.start_s - begin))), events, facts));
  });
  return h("div", { class: "spans" }, rows);
}

const EVENTS = 60; // of a span, that are drawn

// Depth first, the earliest first; spans whose parent is not here stand on top.
function inOrder(spans) {
  const known = new Set(spans.map((one) => one.span_id));
  const below = Map.groupBy(spans, (one) => (known.has(one.parent_id) ? one.parent_id : ""));
  const found = [];
  const walk = (parent, depth) => {
    for (const span of (below.get(parent) || []).sort((one, other) => one.start_s - other.start_s)) {
      found.push({ span, depth });
      if (depth < 12) walk(span.span_id, depth + 1);
    }
  };
  walk("", 0);
  return found;
}
