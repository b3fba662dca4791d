// Addresses of views: the part after '#', such as `#/cycles/12` or `#/fleet?state=FAILED`.

/** The link to a view: `href("cycles", 12)`, `href("fleet", { state: "FAILED" })`. */
export function href(...steps) {
  const parameters = typeof steps.at(-1) === "object" ? steps.pop() : {};
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));
  return `#/${steps.map(encodeURIComponent).join("/")}${query.size ? `?${query}` : ""}`;
}

/**
 * A parsed address: its pattern, the values of the pattern's names, and the query. An address without a view, which is
 * `unknown`, has the first pattern.
 * @typedef {{ pattern: string, parameters: any, query: URLSearchParams, unknown?: string }} Route
 */

/**
 * Reads an address by patterns such as "cycles/:id".
 * @param {string} hash
 * @param {string[]} patterns
 * @returns {Route}
 */
export function parse(hash, patterns) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const steps = path.split("/").map(decode);
  for (const pattern of patterns) {
    const names = pattern.split("/");
    if (names.length !== steps.length) continue;
    if (!names.every((name, i) => (name.startsWith(":") ? steps[i] !== "" : name === steps[i]))) continue;
    const parameters = Object.fromEntries(names.flatMap((name, i) => (name.startsWith(":") ? [[name.slice(1), steps[i]]] : [])));
    return { pattern, parameters, query: new URLSearchParams(query) };
  }
  return { pattern: patterns[0], parameters: {}, query: new URLSearchParams(), ...(path && { unknown: path }) };
}

/**
 * Changes the query of the address, without an entry in the browser's history.
 * @param {Record<string, string | undefined>} parameters
 */
export function setQuery(parameters) {
  const [path] = (location.hash || "#/fleet").split("?", 1);
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) if (value) query.set(name, value);
  history.replaceState(null, "", `${path}${query.size ? `?${query}` : ""}`);
}

/** @param {string} step */
function decode(step) {
  try {
    return decodeURIComponent(step);
  } catch {
    return step;
  }
}
