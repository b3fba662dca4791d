// Interval loops, with their tick counts.

import { getLoops } from "../api.js";
import { stacked } from "../charts.js";
import { h, keyed, replace, setText, throttled } from "../dom.js";
import { count, counted, instant, lower, milliseconds, setting, time, visible, whole, word } from "../format.js";
import { model, now } from "../model.js";
import { href } from "../route.js";
import { sign } from "../states.js";

/** The dispositions of ticks, in the order of the counts. */
const ENDS = ["ran", "skipped", "missed", "coalesced", "dropped"];

const MEANING = {
  ran: "their cycle was admitted",
  skipped: "a cycle with a subsystem in common was running or waiting",
  missed: "the process was down, or came too late",
  coalesced: "folded into another tick's cycle",
  dropped: "refused",
};

export const title = () => "Loops";

export function mount(main, _, scope) {
  const note = h("p", { class: "summary", role: "status" }, "Reading the loops …");
  const list = h("div", { class: "loops" });
  main.append(note, list);
  let loops = [];

  function draw() {
    keyed(list, loops, ({ loop }) => loop.name, card, update);
  }

  const read = throttled(500, () => scope.attempt(async () => {
    loops = await getLoops();
    if (scope.signal.aborted) return;
    const on = loops.filter((loop) => !offWord(loop)).length;
    setText(note, loops.length ? `${counted(loops.length, "loop")}, ${count(on)} on.` : "No loops: cycles run only on request.");
    draw();
  }, note));
  scope.signal.addEventListener("abort", () => read.cancel());
  scope.on("recorded", read);
  scope.on("live", () => model.running.size > 0 && read());
  scope.on("reloaded", read);
  scope.every(1000, draw);
  scope.every(5000, () => model.connection === "open" && read());
  if (model.connection === "open") read();
}

/** Why a loop has no ticks; empty if it has. */
function offWord({ stopped, paused }) {
  return stopped ? "stopped" : paused ? "paused" : "";
}

function card({ loop }) {
  const name = visible(loop.name);
  return h("article", { class: "card" },
    h("div", { class: "headline" }, h("h2", {}, name), h("span", { class: "state" }), h("span", { class: "next" })),
    h("dl", { class: "facts" }),
    h("div", { class: "account" }),
    h("div", { class: "columns" }, h("table", { class: "ticks-table" }, h("caption", {}, "Ticks since it was first started"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Ended"), h("th", { scope: "col", class: "number" }, "Ticks"), h("th", { scope: "col" }, "Because"))),
      h("tbody", {}, ENDS.map((end) => h("tr", { "data-tick": end }, h("th", { scope: "row" }, h("span", { class: "swatch", "data-state": end, "aria-hidden": "true" }), end),
        h("td", { class: "number" }), h("td", { class: "quiet" }, MEANING[end])))),
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "due"), h("td", { class: "number" }), h("td", { class: "quiet" }, "all of these")))),
      h("div", { class: "not-run" })));
}

function update(element, status) {
  const { loop, ticks = {}, notRun = [] } = status;
  const [headline, facts, account, columns] = element.children;
  const [table, ranges] = columns.children;
  const [, state, next] = headline.children;
  const off = offWord(status);
  if (state.dataset.off !== off) {
    const word = off ? "SUSPENDED" : "SUCCEEDED";
    state.dataset.off = off;
    state.dataset.state = word;
    replace(state, sign(word), h("span", {}, off || "on"));
  }
  const left = instant(status.nextDueAt) - now();
  setText(next, off ? "no tick is due" : left > 0 ? `next tick in ${whole(left)}` : "a tick is due");
  element.classList.toggle("stopped", Boolean(off));

  const settings = JSON.stringify([loop, status.lastCycleId, status.origin]);
  if (facts.dataset.settings !== settings) {
    facts.dataset.settings = settings;
    const items = [
      ["Interval", setting(milliseconds(loop.interval))],
      ["Offset", setting(milliseconds(loop.offset ?? "0s"))],
      ["Jitter", setting(milliseconds(loop.jitter ?? "0s"))],
      ["Overlap policy", lower((loop.overlapPolicy ?? "").replace("OVERLAP_POLICY_", ""))],
      ["Catch up", `${lower((loop.catchUp ?? "").replace("CATCH_UP_", ""))}${loop.catchUp === "CATCH_UP_ONE" ? ` within ${setting(milliseconds(loop.catchUpWindow))}` : ""}`],
      ["Deadline", loop.deadline ? setting(milliseconds(loop.deadline)) : "default (cycle.deadline)"],
      ["Subsystems", loop.subsystems?.length ? counted(loop.subsystems.length, "subsystem") : "all"],
      ["Declared by", status.origin === "ORIGIN_CONFIG" ? "configuration" : "RPC"],
      ["Last cycle", Number(status.lastCycleId ?? 0) ? h("a", { href: href("cycles", status.lastCycleId) }, status.lastCycleId) : "none"],
      ["History", h("a", { href: href("cycles", { loop: loop.name }) }, "its cycles")],
    ];
    replace(facts, items.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))));
  }

  const counts = Object.fromEntries(ENDS.map((end) => [end, Number(ticks[end] ?? 0)]));
  const sum = JSON.stringify(counts);
  if (account.dataset.sum !== sum) {
    account.dataset.sum = sum;
    replace(account, h("p", { class: "equation" }, `${count(ticks.due)} due = ${ENDS.map((end) => `${count(counts[end])} ${end}`).join(" + ")}`),
      stacked(counts, ENDS, "Ticks"));
    for (const [i, row] of [...table.tBodies[0].rows].entries()) setText(row.cells[1], count(counts[ENDS[i]]));
    setText(table.tFoot.rows[0].cells[1], count(ticks.due));
  }

  const shown = JSON.stringify(notRun);
  if (ranges.dataset.shown !== shown) {
    ranges.dataset.shown = shown;
    replace(ranges, notRun.length === 0 ? h("p", { class: "quiet" }, "Every due tick has run.") : notRunTable([...notRun].reverse()));
  }
}

function notRunTable(ranges) {
  return h("table", {}, h("caption", {}, "Latest ticks that did not run, newest first"),
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Due"), h("th", { scope: "col", class: "number" }, "Ticks"), h("th", { scope: "col" }, "Ended"))),
    h("tbody", {}, ranges.map((range) => h("tr", {},
      h("th", { scope: "row", class: "time" }, range.count === "1" ? time(range.firstDueAt) : `${time(range.firstDueAt)} to ${time(range.lastDueAt)}`),
      h("td", { class: "number" }, count(range.count)),
      h("td", {}, lower(word(range.disposition, "TICK_DISPOSITION_")))))));
}
