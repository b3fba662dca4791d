// A Gantt chart of a cycle: a table with a row for each subsystem, one column of which is drawn.

import { h, keyed, replace, setAttribute, setText } from "./dom.js";
import { duration, setting, visible } from "./format.js";
import { badge, hasFailed, reasonOf, setBadge, stateOf } from "./states.js";

/** Number of grid lines of the time axis. */
const LINES = 4;

/**
 * The empty table. `href` returns the link of a part; `details` adds columns that only a record can fill.
 */
export function gantt({ caption, href, details = false }) {
  const axis = h("div", { class: "axis", "aria-hidden": "true" });
  const rows = h("tbody");
  const element = h("table", { class: details ? "gantt details" : "gantt" },
    h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {},
      h("th", { scope: "col" }, "Subsystem"),
      h("th", { scope: "col" }, "State"),
      h("th", { scope: "col", class: "track" }, h("span", { class: "unseen" }, "Time line"), axis),
      h("th", { scope: "col", class: "number" }, "Start"),
      h("th", { scope: "col", class: "number" }, "Duration"),
      details && [
        h("th", { scope: "col", class: "number" }, h("abbr", { title: "How long it waited for a free call slot" }, "Queued")),
        h("th", { scope: "col", class: "number" }, "Attempts"),
        h("th", { scope: "col", class: "number" }, "Issues"),
      ])),
    rows);
  let drawn = "";

  /** Draws these parts on a scale in milliseconds. `at` is the end of running parts. */
  function draw(parts, { scale, at = scale, critical = new Set() }) {
    const step = niceStep(scale);
    if (drawn !== `${scale} ${step}`) {
      drawn = `${scale} ${step}`;
      replace(axis, ...Array.from({ length: Math.floor((scale * 0.92) / step) + 1 }, (_, i) =>
        h("span", { style: { left: percent(i * step, scale) } }, i ? setting(i * step) : "0")));
      element.style.setProperty("--step", percent(step, scale));
    }
    keyed(rows, parts, (part) => part.name, (part) => row(part, href, details), (line, part) =>
      update(line, part, { scale, at, isCritical: critical.has(part.name), details }));
  }

  return { element, draw };
}

function row(part, href, details) {
  const name = visible(part.name);
  return h("tr", {},
    h("th", { scope: "row" },
      href ? h("a", { href: href(part.name), title: name }, name) : h("span", { title: name }, name),
      h("span", { class: "critical-mark", hidden: true, title: "On the critical path" },
        h("span", { class: "unseen" }, "on the critical path"))),
    h("td", {}, badge("WAITING")),
    h("td", { class: "track", "aria-hidden": "true" }, h("div", { class: "queue" }), h("div", { class: "bar" })),
    h("td", { class: "number", "data-label": "Start" }),
    h("td", { class: "number", "data-label": "Duration" }),
    details && [
      h("td", { class: "number", "data-label": "Queued" }),
      h("td", { class: "number", "data-label": "Attempts" }),
      h("td", { class: "number", "data-label": "Issues" }),
    ]);
}

function update(line, part, { scale, at, isCritical, details }) {
  const [name, state, track, start, lasted, queued, attempts, issues] = line.children;
  const word = stateOf(part);
  setBadge(state.firstChild, word);
  setAttribute(state, "title", word === "SUCCEEDED" ? null : visible(reasonOf(part), 1000) || null);
  line.classList.toggle("failed", hasFailed(part));
  line.classList.toggle("critical", isCritical);
  name.lastChild.hidden = !isCritical;

  const [queue, bar] = track.children;
  const end = part.end ?? (word === "RUNNING" ? Math.max(at, part.start ?? 0) : undefined);
  // A page that was opened during a cycle knows when a part ended, but not when it began.
  const begin = part.start ?? end;
  bar.hidden = end === undefined || word === "WAITING";
  if (!bar.hidden) {
    bar.dataset.state = word;
    bar.style.left = percent(begin, scale);
    bar.style.width = percent(end - begin, scale);
  }
  const wait = part.queuedMs ?? 0;
  queue.hidden = !(part.start !== undefined && wait / scale > 0.002);
  if (!queue.hidden) {
    queue.style.left = percent(Math.max(0, part.start - wait), scale);
    queue.style.width = percent(wait, scale);
  }
  setText(start, part.start === undefined ? "–" : duration(part.start));
  setText(lasted, part.start === undefined || end === undefined ? "–" : duration(end - part.start));
  if (details) {
    setText(queued, part.queuedMs ? duration(part.queuedMs) : "–");
    setText(attempts, String(part.attempts ?? 0));
    setText(issues, part.issues?.length ? String(part.issues.length) : "–");
  }
}

/** @param {number} part @param {number} whole */
function percent(part, whole) {
  return `${whole > 0 ? Math.min(100, (part / whole) * 100) : 0}%`;
}

/**
 * A round number of milliseconds between lines.
 * @param {number} scale
 */
function niceStep(scale) {
  const rough = scale / LINES || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((n) => n * power).find((step) => step >= rough) ?? rough;
}

// ------------------------------------------------------------------------------------- many subsystems

/** How many parts run at each moment of a record: steps [ms, count], and the highest count. */
export function concurrency(parts) {
  const moves = parts.filter((part) => part.start !== undefined).flatMap((part) => [[part.start, 1], [part.end, -1]]);
  moves.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const steps = [];
  let [running, highest] = [0, 0];
  for (const [at, change] of moves) {
    running += change;
    highest = Math.max(highest, running);
    if (steps.length && steps.at(-1)[0] === at) steps.at(-1)[1] = running;
    else steps.push([at, running]);
  }
  return { steps, highest };
}
