// Charts, each with a text equivalent: colours and shapes are never the only information.

import { h, s } from "./dom.js";
import { count, counted, duration, lower, setting, time } from "./format.js";
import { sign } from "./states.js";

/**
 * One bar, divided by these counts: { state: number }. `order` gives the states and their order.
 * @param {Record<string, number>} counts
 * @param {string[]} order
 * @param {string} label
 */
export function stacked(counts, order, label) {
  const present = order.filter((state) => counts[state]);
  const words = present.map((state) => `${count(counts[state])} ${lower(state)}`).join(", ");
  return h("div", { class: "stacked", role: "img", "aria-label": `${label}: ${words || "none"}` },
    present.map((state) => h("span", { "data-state": state, style: { "flex-grow": counts[state] }, title: `${count(counts[state])} ${lower(state)}` })));
}

/** Cycles over time, oldest first: the height is the duration, with a sign above each cycle that did not succeed. */
export function durations(cycles, href) {
  const [WIDTH, HEIGHT, TOP, LEFT] = [1000, 180, 20, 0];
  // The duration of a cycle with an unreadable record is not known.
  const sorted = cycles.map((cycle) => cycle.durationMs).filter(Number.isFinite).sort((a, b) => a - b);
  const highest = sorted.at(-1) || 1;
  const top = niceCeiling(highest);
  const slot = (WIDTH - LEFT) / Math.max(cycles.length, 20);
  const y = (ms) => HEIGHT - ((ms || 0) / top) * (HEIGHT - TOP);
  const bars = cycles.map((cycle, i) => {
    const x = LEFT + i * slot;
    const text = `Cycle ${cycle.id}, ${lower(cycle.state)}, ${duration(cycle.durationMs)}, ${time(cycle.finishedAt)}`;
    const bar = s("rect", {
      class: "bar", "data-state": cycle.state, x: x + slot * 0.12, width: slot * 0.76, y: Math.min(y(cycle.durationMs), HEIGHT - 2),
      height: Math.max(HEIGHT - y(cycle.durationMs), 2),
    });
    // Skipped by the Tab key: the table below has the same links.
    return s("a", { href: href(cycle), tabindex: -1, "aria-hidden": "true" },
      s("title", {}, text),
      s("rect", { class: "hit", x, width: slot, y: 0, height: HEIGHT }),
      bar);
  });
  const lines = [top / 2, top].map((ms) => s("line", { class: "line", x1: LEFT, x2: WIDTH, y1: y(ms), y2: y(ms) }));
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" }, lines, bars);
  const marks = cycles.map((cycle, i) =>
    cycle.state !== "SUCCEEDED" &&
    h("span", { class: "mark", "data-state": cycle.state, style: { left: `${((i + 0.5) * slot * 100) / WIDTH}%` } }, sign(cycle.state)));
  const bad = cycles.filter((cycle) => cycle.state !== "SUCCEEDED" && cycle.state !== "UNREADABLE").length;
  const words = cycles.length === 0 ? "No cycles." :
    `Durations of cycles ${cycles[0].id} to ${cycles.at(-1).id}: median ${duration(sorted[Math.floor(sorted.length / 2)])}, ` +
    `longest ${duration(highest)}; ${bad ? counted(bad, "cycle") : "none"} of ${count(cycles.length)} did not succeed.`;
  return h("figure", { class: "chart" },
    h("div", { class: "plot" },
      h("div", { class: "scale", "aria-hidden": "true" }, [top, top / 2, 0].map((ms) => h("span", {}, ms ? setting(ms) : "0"))),
      h("div", { class: "canvas" }, h("div", { class: "marks", "aria-hidden": "true" }, marks), drawing)),
    h("figcaption", {}, words));
}

/** Number of concurrent parts: see `concurrency`. */
export function profile({ steps, highest }, scale) {
  const [WIDTH, HEIGHT] = [1000, 90];
  const x = (ms) => ((ms / scale) * WIDTH).toFixed(1);
  const y = (running) => (HEIGHT - (running / (highest || 1)) * (HEIGHT - 4)).toFixed(1);
  // More steps than pixels would only cost time.
  const every = Math.ceil(steps.length / 2000);
  let path = `M0 ${HEIGHT}`;
  let last = String(HEIGHT);
  for (const [at, running] of steps.filter((_, i) => i % every === 0 || i === steps.length - 1)) {
    const next = y(running);
    path += `L${x(at)} ${last}L${x(at)} ${next}`;
    last = next;
  }
  return h("figure", { class: "chart profile" },
    s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
      s("path", { d: `${path}L${x(scale)} ${last}L${x(scale)} ${HEIGHT}Z` })),
    h("figcaption", {}, `Subsystems at work at one time: up to ${count(highest)}, over ${duration(scale)}.`));
}

/** @param {number} value */
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 6, 8, 10].map((n) => n * power).find((step) => step >= value) ?? value;
}
