// The history: durations and failures over time, page by page.

import { getLoops, listCycles } from "../api.js";
import { durations, stacked } from "../charts.js";
import { h, keyed, labelled, replace, throttled } from "../dom.js";
import { count, counted, duration, lower, time, visible } from "../format.js";
import { model, summaries, summary } from "../model.js";
import { href, setQuery } from "../route.js";
import { badge, CYCLE_STATES, SUBSYSTEM_STATES } from "../states.js";

const PAGE = 50;

/** A page can be short, or even empty: at most this number of pages is read before the user must continue. */
const REQUESTS = 12;

export const title = () => "Cycles";

export function mount(main, route, scope) {
  const filter = Object.fromEntries(["state", "trigger", "loop", "subsystem"].map((name) => [name, route.query.get(name) ?? ""]));
  // Tokens of the pages up to this one; the first page has no token.
  let tokens = route.query.get("before") ? ["", route.query.get("before")] : [""];
  let next = "";
  let shown = [];
  let reading = 0;

  const chart = h("div");
  const note = h("p", { class: "summary", role: "status" }, "Reading the history …");
  const rows = h("tbody");
  const table = h("table", { class: "cycles", hidden: true }, h("caption", { class: "unseen" }, "Recorded cycles, newest first"),
    h("thead", {}, h("tr", {}, ["Cycle", "State", "Trigger", "Finished"].map((text) => h("th", { scope: "col" }, text)),
      h("th", { scope: "col", class: "number" }, "Duration"), h("th", { scope: "col", class: "wide" }, "Subsystems"), h("th", { scope: "col" }, "Error"))),
    rows);
  const newer = h("button", { type: "button", rel: "prev", onclick: () => { tokens.pop(); turn(); } }, "Newer");
  const older = h("button", { type: "button", rel: "next", onclick: () => { tokens.push(next); turn(); } }, "Older");
  const pager = h("nav", { class: "pager", "aria-label": "Pages of cycles", hidden: true }, newer, h("span"), older);
  const loops = h("select", { id: "loop" }, h("option", { value: "" }, "any"));
  main.append(form(), note, chart, table, pager);

  function form() {
    const choice = (name, label, options) => field(name, label, h("select", { id: name },
      h("option", { value: "" }, "any"), options.map((option) => h("option", { value: option, selected: filter[name] === option }, lower(option)))));
    const field = (name, label, control) => labelled(label, control, (text) => {
      filter[name] = text;
      tokens = [""];
      turn();
    });
    const subsystem = h("input", { type: "search", id: "subsystem", value: filter.subsystem, placeholder: "Full name", autocomplete: "off", spellcheck: "false" });
    return h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); subsystem.dispatchEvent(new Event("change")); } },
      choice("state", "State", CYCLE_STATES),
      choice("trigger", "Trigger", ["MANUAL", "LOOP", "PARENT"]),
      field("loop", "Loop", loops),
      field("subsystem", "Subsystem", subsystem));
  }

  function turn() {
    shown = [];
    setQuery({ ...filter, before: tokens.at(-1) });
    read();
  }

  async function read() {
    reading += 1;
    const mine = reading;
    await scope.attempt(async () => {
      const found = [];
      let pageToken = tokens.at(-1);
      for (let i = 0; i < REQUESTS && found.length < PAGE; i += 1) {
        const page = await listCycles({
          pageSize: PAGE - found.length, pageToken, loop: filter.loop, subsystem: filter.subsystem,
          states: filter.state && `CYCLE_STATE_${filter.state}`, trigger: filter.trigger && `TRIGGER_${filter.trigger}`,
        });
        found.push(...summaries(page));
        pageToken = page.nextPageToken;
        if (scope.signal.aborted || mine !== reading) return;
        // Pages of large records are short; and some cycles may have been recorded meanwhile.
        const isNewer = (cycle) => tokens.length === 1 && found.length > 0 && cycle.revision > found[0].revision;
        shown = [...shown.filter(isNewer), ...found];
        next = pageToken;
        draw();
        if (!pageToken) break;
      }
    }, note);
  }

  function passes(cycle, record) {
    return (!filter.state || cycle.state === filter.state) && (!filter.trigger || cycle.trigger === filter.trigger) &&
      (!filter.loop || cycle.loop === filter.loop) &&
      (!filter.subsystem || (record.subsystems ?? []).some((part) => part.name === filter.subsystem));
  }

  function draw() {
    newer.disabled = tokens.length < 2;
    older.disabled = !next;
    pager.hidden = newer.disabled && older.disabled;
    const unreadable = shown.filter((cycle) => cycle.state === "UNREADABLE").length;
    const bad = shown.filter((cycle) => cycle.state !== "SUCCEEDED").length - unreadable;
    const outcomes = [
      bad && `${count(bad)} did not succeed.`,
      unreadable && `The records of ${count(unreadable)} are damaged and can't be read.`,
    ].filter(Boolean);
    replace(note, shown.length
      ? `${counted(shown.length, "cycle")}${tokens.length > 1 ? "" : ", newest first"}${next ? "; there are more" : ""}: ${outcomes.join(" ") || "all succeeded."}`
      : next ? "No match among the cycles examined so far; continue with Older."
      : Object.values(filter).some(Boolean) ? "No recorded cycle matches the filter." : "No cycle is recorded.");
    table.hidden = chart.hidden = shown.length === 0;
    if (shown.length) replace(chart, durations([...shown].reverse(), (cycle) => href("cycles", cycle.id)));
    keyed(rows, shown, (cycle) => cycle.id || "–", row);
  }

  const redraw = throttled(300, draw);
  scope.signal.addEventListener("abort", () => redraw.cancel());
  const add = (cycle) => {
    if (tokens.length > 1 || cycle.revision <= shown[0]?.revision) return;
    shown.unshift(cycle);
    // The page grows at its top, and is read again at some point.
    if (shown.length < 2 * PAGE) redraw();
    else read();
  };
  scope.on("recorded", (record) => {
    const cycle = summary(record);
    if (passes(cycle, record)) add(cycle);
  });
  // It is unknown whether it matches the filter.
  scope.on("unreadable", add);
  scope.on("reloaded", read);
  if (model.connection === "open") read();
  scope.attempt(async () => {
    for (const { loop } of await getLoops()) loops.append(h("option", { value: loop.name, selected: loop.name === filter.loop }, visible(loop.name)));
  }, h("p"));
}

function row(cycle) {
  const isKnown = cycle.state !== "INTERRUPTED" && cycle.state !== "UNREADABLE";
  const trigger = cycle.loop ? `loop ${cycle.loop}` : lower(cycle.trigger) || "unknown";
  return h("tr", { class: cycle.state === "SUCCEEDED" ? null : "failed" },
    h("th", { scope: "row" }, cycle.id ? h("a", { href: href("cycles", cycle.id) }, cycle.id) : "–"),
    h("td", {}, badge(cycle.state)),
    h("td", { "data-label": "Trigger" }, visible(trigger)),
    h("td", { "data-label": "Finished", class: "time" }, time(cycle.finishedAt)),
    h("td", { "data-label": "Duration", class: "number" }, isKnown ? duration(cycle.durationMs) : "not known"),
    h("td", { class: "wide" }, cycle.total ? stacked(cycle.counts, SUBSYSTEM_STATES, "Subsystems") : h("span", { class: "quiet" }, isKnown ? "none" : "not known")),
    h("td", { class: "reason", title: visible(cycle.error, 1000) || null }, visible(cycle.error, 300)));
}
