// Shows outputs, and the changes between two of them.

import { h, scrolling } from "./dom.js";
import { count, counted, visible } from "./format.js";

/** Most characters that are shown at first. */
const SHOWN = 20_000;

/** Most changes that are listed. */
const CHANGES = 300;

/**
 * A value as indented JSON.
 * @param {unknown} value
 * @param {string} label
 */
export function json(value, label) {
  const text = JSON.stringify(value, null, 2) ?? "null";
  const code = h("code", {}, visible(text, SHOWN));
  const pre = h("pre", { class: "json", tabindex: 0, role: "region", "aria-label": label }, code);
  if (text.length <= SHOWN) return pre;
  const more = h("button", { type: "button", onclick: () => {
    code.textContent = visible(text, Infinity);
    more.remove();
    pre.focus();
  } }, `Show all ${counted(text.length, "character")}`);
  return h("div", {}, pre, more);
}

/** The differences between two values: { path, before, after }, where `undefined` means missing. */
export function changes(before, after, path = "", found = []) {
  if (Object.is(before, after)) return found;
  const areObjects = isObject(before) && isObject(after);
  const areArrays = Array.isArray(before) && Array.isArray(after);
  if (areObjects || areArrays) {
    const keys = areObjects
      ? new Set([...Object.keys(before), ...Object.keys(after)])
      : Array.from({ length: Math.max(before.length, after.length) }, (_, i) => i);
    for (const key of keys) {
      const step = areArrays ? `[${key}]` : /^[\w-]+$/.test(String(key)) ? `.${key}` : `[${JSON.stringify(key)}]`;
      changes(own(before, key), own(after, key), path + step, found);
    }
  } else {
    found.push({ path: path.replace(/^\./, "") || "(all)", before, after });
  }
  return found;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Only own properties: an output may have a key such as "constructor". */
function own(object, key) {
  return Object.hasOwn(object, key) ? object[key] : undefined;
}

/** The changes from one output to another, as a table. */
export function diff(before, after, { caption, beforeLabel, afterLabel }) {
  const all = changes(before, after);
  if (all.length === 0) return h("p", { class: "quiet" }, `Nothing has changed from ${beforeLabel} to ${afterLabel}.`);
  const cell = (value) =>
    h("td", {}, value === undefined ? h("span", { class: "quiet" }, "none") : h("code", {}, visible(JSON.stringify(value), 500)));
  return scrolling(caption,
    h("table", { class: "diff" },
      h("caption", {}, `${caption}: ${counted(all.length, "value")} differ${all.length === 1 ? "s" : ""}`),
      h("thead", {}, h("tr", {}, ["Value", beforeLabel, afterLabel].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, all.slice(0, CHANGES).map(({ path, before, after }) =>
        h("tr", { "data-change": before === undefined ? "added" : after === undefined ? "removed" : "changed" },
          h("th", { scope: "row" }, h("code", {}, visible(path, 300))), cell(before), cell(after))))),
    all.length > CHANGES && h("p", { class: "quiet" }, `… and ${count(all.length - CHANGES)} more.`));
}
