// Elements from data. Text is always text: nothing here reads markup, and the page's policy
// (require-trusted-types-for) forbids that anything could.

const SVG = "http://www.w3.org/2000/svg";

// Drawn as its code: what turns the order of letters around, or is not seen at all.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const TEXTS = ["title", "aria-label"]; // attributes that are read; others name things exactly

export function visible(text) {
  return text.replace(UNSEEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

// h("p", {class: "x", "aria-label": "y", on: {click}}, "text", node, null)
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    } else {
      put(node, name, value === true ? "" : value);
    }
  }
  node.append(...children.flat().filter((one) => one !== null && one !== undefined).map((one) => (typeof one === "string" ? visible(one) : one)));
  return node;
}

// Writes only what has changed, so that a screen reader and a selection are left alone.
export function say(node, text) {
  const said = text === null || text === undefined ? "" : visible(String(text));
  if (node.textContent !== said) node.textContent = said;
}

export function put(node, name, value) {
  if (value === null || value === undefined || value === false) {
    node.removeAttribute(name);
    return;
  }
  const said = TEXTS.includes(name) ? visible(String(value)) : String(value);
  if (node.getAttribute(name) !== said) node.setAttribute(name, said);
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

// A part of the page for each item, kept while its key is there: focus stays where it is.
// make(item) -> {node, update(item)}
export function keyed(parent, keyOf, make) {
  const parts = new Map();
  return (items) => {
    const seen = new Set();
    let at = parent.firstElementChild;
    for (const item of items) {
      const key = keyOf(item);
      if (seen.has(key)) continue;
      seen.add(key);
      let part = parts.get(key);
      if (!part) parts.set(key, (part = make(item)));
      part.update(item);
      if (part.node === at) at = at.nextElementSibling;
      else parent.insertBefore(part.node, at);
    }
    for (const [key, part] of parts) {
      if (seen.has(key)) continue;
      part.node.remove();
      parts.delete(key);
    }
  };
}

export function panel(name, title) {
  const note = h("p", { class: "note" });
  const head = h("div", { class: "head" }, h("h2", { id: `${name}-title` }, title), note);
  const node = h("section", { class: `panel ${name}`, "aria-labelledby": `${name}-title` }, head);
  return { node, head, note };
}

// columns: [[heading, class]]; a row's cells get their heading for narrow screens.
export function table(caption, columns) {
  const body = h("tbody");
  const heads = columns.map(([title, kind]) => h("th", { scope: "col", class: kind }, title));
  const node = h(
    "table", {},
    h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, heads)),
    body,
  );
  const row = (...cells) => {
    const made = cells.map((cell, at) => {
      const [title, kind] = columns[at];
      const one = at === 0 ? h("th", { scope: "row", class: kind }) : h("td", { class: kind, "data-label": title });
      one.append(cell);
      return one;
    });
    return h("tr", {}, made);
  };
  return { node, body, row };
}

// A badge has a word as well as a colour.
export function badge() {
  const node = h("span", { class: "badge" });
  return {
    node,
    update(text, tone) {
      say(node, text);
      put(node, "data-tone", tone);
    },
  };
}

export function meter(label) {
  const bar = h("span");
  const node = h("span", { class: "meter", role: "img", "aria-label": label }, bar);
  return {
    node,
    update(share, tone, said) {
      const known = share !== null && share !== undefined && Number.isFinite(share);
      show(node, known);
      bar.style.width = `${known ? 100 * Math.min(1, Math.max(0, share)) : 0}%`;
      put(node, "data-tone", tone);
      put(node, "aria-label", `${label}: ${said}`);
    },
  };
}
