// Objects of others' kinds, a list in JSON on stdin: what their schemas have against each, on stdout.
// `make kinds` installs the schemas. Rules in CEL are not among them.
import { readFileSync } from "node:fs";

const PACKAGES = {
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

// Schemas are compiled functions here. They read each field that they know and pass over others:
// what nobody has read is not known.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const copy = Array.isArray(value) ? [] : {};
  for (const [name, one] of Object.entries(value)) {
    const at = `${path}/${name}`;
    const inner = watched(one, at, unread);
    unread.add(at);
    Object.defineProperty(copy, name, { enumerable: true, get: () => (unread.delete(at), inner) });
  }
  return copy;
}

function topmost(paths) {
  return paths.filter((path) => !paths.some((other) => path.startsWith(`${other}/`)));
}

async function problems(object) {
  const group = object.apiVersion.split("/")[0];
  const kind = `${PACKAGES[group]}/${object.apiVersion}/${object.kind}`;
  const models = await import(`@kubernetes-models/${kind}`);
  const model = new models[object.kind]({});
  const unread = new Set();
  Object.defineProperties(model, Object.getOwnPropertyDescriptors(watched(object, "data", unread)));
  const found = [];
  try {
    model.validate();
  } catch (error) {
    found.push(error.message);
  }
  return [...found, ...topmost([...unread]).map((path) => `${path} is not known`)];
}

console.log(JSON.stringify(await Promise.all(JSON.parse(readFileSync(0, "utf8")).map(problems))));
