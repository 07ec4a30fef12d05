// Small pictures: lines over time, stacked bars, ladders. Their numbers stand beside them as text.

import { h, put, say, svg } from "./dom.js";
import { SPAN_S } from "./samples.js";

const WIDTH = 300;

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
      const x = (at) => WIDTH - ((now - at) / SPAN_S) * WIDTH;
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
          part = h("span", { class: `part ${one.name}` });
          parts.set(one.name, part);
          node.append(part);
        }
        part.style.width = `${(100 * one.value) / sum}%`;
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
          part = { value: h("b"), item: null };
          part.item = h("li", {}, h("i", { class: `key ${one.name}`, "aria-hidden": "true" }), h("span", {}, one.name.replaceAll("_", " ")), part.value);
          parts.set(one.name, part);
          node.append(part.item);
        }
        say(part.value, one.said);
        put(part.item, "data-none", one.value > 0 ? null : "");
      }
    },
  };
}
