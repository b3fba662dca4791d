// Addresses of views: what is behind the '#', such as `#/cycles/12` or `#/fleet?state=FAILED`.

/** The link to a view: `href("cycles", 12)`, `href("fleet", { state: "FAILED" })`. */
export function href(...steps) {
  const parameters = typeof steps.at(-1) === "object" ? steps.pop() : {};
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));
  return `#/${steps.map(encodeURIComponent).join("/")}${query.size ? `?${query}` : ""}`;
}

/** Reads an address by patterns such as "cycles/:id": { pattern, parameters, query }. */
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
  return { pattern: patterns[0], parameters: {}, query: new URLSearchParams() };
}

/** Changes what is behind the '?' of the address, without a step in the browser's history. */
export function setQuery(parameters) {
  const [path] = (location.hash || "#/fleet").split("?", 1);
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value));
  history.replaceState(null, "", `${path}${query.size ? `?${query}` : ""}`);
}

function decode(step) {
  try {
    return decodeURIComponent(step);
  } catch {
    return step;
  }
}
