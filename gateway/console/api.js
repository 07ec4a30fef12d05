// What is asked of the gateway, and the key that it is asked with. The key is kept by this tab
// alone (sessionStorage) and goes nowhere but into this gateway's Authorization header.

const KEY = "headgate.admin";
const TIMEOUT_MS = 5000;

export class Refused extends Error {
  constructor(status, error) {
    super((error && error.message) || `the gateway answered ${status}`);
    this.status = status;
    this.code = (error && error.code) || "";
  }
}

export class Away extends Error {}

export function adminKey() {
  return sessionStorage.getItem(KEY) || "";
}

export function keepAdminKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// The JSON answer. Throws Refused, and Away where there is none.
export async function ask(path, body) {
  const headers = {};
  if (adminKey()) headers.authorization = `Bearer ${adminKey()}`;
  const options = { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT_MS) };
  if (body !== undefined) {
    options.method = "POST";
    headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer, told;
  try {
    answer = await fetch(path, options);
    told = await answer.json();
  } catch (error) {
    throw new Away(error.name === "TimeoutError" ? "it did not answer in time" : "nothing answers there");
  }
  if (!answer.ok) throw new Refused(answer.status, told.error);
  return told;
}

const VARIANT = "admin/variants/candidate";
export const overview = (since) => ask(`admin/overview?since=${since}`);
export const tenants = (by) => ask(`admin/tenants?by=${by}`);
export const requests = (asked) => ask(`admin/requests${asked ? `?${asked}` : ""}`);
export const receipt = (id) => ask(`admin/receipts/${encodeURIComponent(id)}`);
export const trace = (id) => ask(`admin/traces/${encodeURIComponent(id)}`);
export const pause = (id, why) => ask(`${VARIANT}/pause`, { id, why });
export const resume = (id) => ask(`${VARIANT}/resume`, { id });
export const rollBack = (id, why) => ask(`${VARIANT}/rollback`, { id, why });
