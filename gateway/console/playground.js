// One request by hand: its stream as it comes, which of its tokens a draft had guessed, what it took.

import { h, panel, put, say, show } from "./dom.js";
import { NONE, count, rate, seconds } from "./format.js";

const CHAT = "v1/chat/completions";
const KEY = "headgate.tenant"; // the key of a tenant, where the policy has some; of this tab alone

export function playgroundView() {
  const asking = panel("asking", "Ask");
  const answer = panel("answer", "Answer");
  const form = fields();
  const out = output();
  asking.node.append(form.node);
  answer.node.append(out.node);
  let stop = null;
  form.node.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stop) {
      stop.abort();
      return;
    }
    stop = new AbortController();
    form.running(true);
    out.begin();
    try {
      await stream(form.body(), form.headers(), stop.signal, out);
      out.end();
    } catch (error) {
      out.failed(stop.signal.aborted ? "stopped" : error.message, stop.signal.aborted);
    } finally {
      stop = null;
      form.running(false);
    }
  });
  return {
    node: h("div", { class: "view playground" }, h("h1", { class: "unseen" }, "Playground"), asking.node, answer.node),
    update: (told) => form.update(told),
  };
}

// ---- the form -----------------------------------------------------------------------------------

function fields() {
  const field = (name, label, node) => {
    node.id = `ask-${name}`;
    return h("div", { class: `field ${name}` }, h("label", { for: node.id }, label), node);
  };
  const model = h("select");
  const tier = h("select");
  const system = h("textarea", { rows: "2", placeholder: "None" });
  const prompt = h("textarea", { rows: "6", required: true });
  const most = h("input", { type: "number", min: "1", max: "32768", value: "200", inputmode: "numeric" });
  const heat = h("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0", inputmode: "decimal" });
  const key = h("input", { type: "password", autocomplete: "off", value: sessionStorage.getItem(KEY) || "", on: { change: () => sessionStorage.setItem(KEY, key.value.trim()) } });
  const keyField = field("key", "Tenant's key", key);
  const go = h("button", { type: "submit", class: "strong" }, "Send");
  prompt.value = "Count from one to twelve, then say it again.";
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) node.requestSubmit();
  });
  const node = h("form", {},
    h("div", { class: "row" }, field("model", "Model", model), field("tier", "Tier", tier), field("most", "Tokens at most", most), field("heat", "Temperature", heat)),
    keyField, field("system", "System", system), field("prompt", "User", prompt),
    h("div", { class: "actions" }, go, h("span", { class: "sub" }, "Ctrl Enter sends")));
  const options = (select, names) => {
    if ([...select.options].map((one) => one.value).join("\n") === names.join("\n")) return;
    const before = select.value;
    select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    if (names.includes(before)) select.value = before;
  };
  return {
    node,
    update(told) {
      options(model, told.models);
      options(tier, [...told.tiers.map((one) => one.name)].sort((one) => (one === "standard" ? -1 : 0)));
      show(keyField, told.keys);
    },
    running: (yes) => say(go, yes ? "Stop" : "Send"),
    headers() {
      const headers = { "content-type": "application/json", "x-headgate-tier": tier.value, "x-headgate-marks": "1" };
      if (!keyField.hidden && key.value.trim()) headers.authorization = `Bearer ${key.value.trim()}`;
      return headers;
    },
    body() {
      const messages = [{ role: "user", content: prompt.value }];
      if (system.value.trim()) messages.unshift({ role: "system", content: system.value });
      return {
        model: model.value, messages, stream: true, stream_options: { include_usage: true },
        max_tokens: Number(most.value), temperature: Number(heat.value),
      };
    },
  };
}

// ---- the stream ---------------------------------------------------------------------------------

async function stream(body, headers, signal, out) {
  const answer = await fetch(CHAT, { method: "POST", headers, body: JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
  out.head(answer.headers);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error?.message || `the gateway answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      for (const text of event.split("\n")) if (text.startsWith("data: ") && text !== "data: [DONE]") out.chunk(JSON.parse(text.slice(6)));
    }
  }
}

// ---- the answer ---------------------------------------------------------------------------------

const FACTS = ["First token", "Tokens", "Tokens a second", "Guessed right", "Cached", "Tier"];

function output() {
  const text = h("div", { class: "said", role: "log", "aria-label": "Answer", tabindex: "0" });
  const empty = h("p", { class: "empty" }, "Nothing was asked yet.");
  const failed = h("p", { class: "failed", role: "alert" });
  const values = Object.fromEntries(FACTS.map((name) => [name, h("dd")]));
  const facts = h("dl", { class: "facts" }, FACTS.map((name) => h("div", {}, h("dt", {}, name), values[name])));
  const link = h("a");
  const key = h("p", { class: "sub" }, h("mark", { class: "guess" }, "Marked"), " tokens were guessed by a draft, and found right by the model.");
  const node = h("div", {}, empty, text, failed, facts, key, h("p", {}, link));
  for (const one of [text, failed, facts, key]) show(one, false);
  let at;
  const since = () => (performance.now() - at.began) / 1000;
  const draw = () => {
    say(values["First token"], seconds(at.first));
    say(values.Tokens, count(at.usage?.completion_tokens ?? at.tokens));
    const tokens = at.usage?.completion_tokens ?? at.tokens;
    say(values["Tokens a second"], tokens > 1 && at.last > at.first ? rate((tokens - 1) / (at.last - at.first)) : NONE);
    say(values["Guessed right"], at.marked ? `${count(at.guessed)} of ${count(tokens)}` : "not told");
    const prompt = at.usage?.prompt_tokens;
    say(values.Cached, at.usage ? `${count(at.usage.prompt_tokens_details?.cached_tokens)} of ${count(prompt)}` : NONE);
    show(key, at.marked);
  };
  return {
    node,
    begin() {
      at = { began: performance.now(), first: null, last: null, tokens: 0, guessed: 0, marked: false, usage: null };
      text.replaceChildren();
      for (const one of [empty, failed, key]) show(one, false);
      for (const one of [text, facts]) show(one, true);
      put(text, "aria-busy", "true");
      show(link, false);
      draw();
    },
    head(headers) {
      say(values["Tier"], headers.get("x-headgate-tier") || NONE);
      const id = headers.get("x-headgate-receipt");
      if (!id) return;
      link.href = `#request/${encodeURIComponent(id)}`;
      say(link, "Why it went where it went");
      show(link, true);
    },
    chunk(chunk) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) at.usage = chunk.usage;
      const said = chunk.choices?.[0]?.delta?.content;
      if (said) {
        const told = chunk.headgate;
        const right = told?.guessed ?? 0;
        at.last = since();
        at.first ??= at.last;
        at.tokens += told?.tokens ?? 1;
        at.guessed += right;
        at.marked ||= told?.tokens !== undefined;
        const mark = right ? h("mark", { class: "guess", title: "guessed by a draft" }) : text;
        mark.append(said);
        if (right) text.append(mark);
      }
      draw();
    },
    end() {
      put(text, "aria-busy", "false");
      draw();
    },
    failed(why, calm) {
      put(text, "aria-busy", "false");
      say(failed, calm ? "Stopped." : why);
      show(failed, true);
    },
  };
}
