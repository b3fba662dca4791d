// The running cycles, and the progress of one of them; if no cycle runs, the last one.

import { getPlan } from "../api.js";
import { h, keyed, replace, setAttribute, setText, throttled } from "../dom.js";
import { count, counted, duration, instant, visible, whole } from "../format.js";
import { liveCycle, liveOf, MANY, model, now, runningCycles, startedBy } from "../model.js";
import { partsView } from "../parts.js";
import { href } from "../route.js";
import { cycleStateOf, hasFailed, setBadge, badge, withoutParts } from "../states.js";

/** Most running cycles that can be selected; further ones are counted. */
const LISTED = 50;

export const title = () => "Live";

export function mount(main, _, scope) {
  /** @type {any} */
  let plan = null;
  let levels = new Map();
  /** @type {typeof model.last} */
  let held = null;
  /** @type {typeof model.last} */
  let shown = null;

  const state = badge("NONE", "no cycle");
  const name = h("a", { class: "cycle-name" });
  const progress = h("progress", { "aria-label": "Subsystems whose part has ended", max: 1, value: 0 });
  const facts = h("p", { class: "summary" });
  const hold = h("button", { type: "button", id: "hold", "aria-pressed": "false", onclick: () => keep(held ? null : shown) },
    "Keep this cycle");
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Running cycles" });
  const more = h("span", { class: "quiet" });
  const others = h("div", { class: "filters", id: "running", hidden: true }, chips, more);
  const waiting = h("ul", { class: "quiet", id: "waiting", "aria-label": "Waiting cycles" });
  const error = h("p", { class: "problem", hidden: true });
  const parts = partsView({ caption: "The state of each subsystem's part in the cycle", href: (part) => href("subsystems", part) });
  main.append(others, h("div", { class: "headline" }, name, state, hold), progress, facts, error, parts.element, waiting);

  /** From now on shows only this cycle, or any running one. */
  function keep(live) {
    held = live;
    setAttribute(hold, "aria-pressed", String(Boolean(held)));
    draw();
  }

  /** A running cycle is shown until it has ended. */
  function choose(running) {
    // The state of a cycle may have been sent again.
    held &&= liveCycle(held.cycleId) ?? held;
    if (held) return held;
    const still = running.find(({ cycleId }) => cycleId === shown?.cycleId);
    return still ?? running[0] ?? model.last ?? (model.status?.lastCycle ? liveOf(model.status.lastCycle) : null);
  }

  function drawRunning(running) {
    others.hidden = running.length < 2;
    keyed(chips, running.slice(0, LISTED), (live) => live.cycleId,
      (live) => h("button", { type: "button", class: "chip", onclick: () => keep(liveCycle(live.cycleId) ?? live) },
        h("span"), h("span", { class: "count" })),
      (chip, live) => {
        setText(chip.firstChild, visible(`Cycle ${live.cycleId}, ${live.startedBy()}`, 100));
        setText(chip.lastChild, `${count(live.ended())} of ${count(live.parts.size)}`);
        setAttribute(chip, "aria-pressed", String(live === shown));
      });
    setText(more, running.length > LISTED ? `and ${counted(running.length - LISTED, "more cycle")}` : "");
  }

  function drawWaiting() {
    const { waitingCycles = [], queuedCycles = 0 } = model.status ?? {};
    // The status is asked for now and then: some of them may run by now.
    const still = waitingCycles.filter(({ cycleId }) => !liveCycle(cycleId));
    waiting.hidden = !still.length;
    keyed(waiting, still.slice(0, LISTED), (one) => one.cycleId, () => h("li"), (line, one) => setText(line, visible([
      `Cycle ${one.cycleId}, ${startedBy(one)}, has waited ${whole(now() - instant(one.scheduledAt))} for`,
      one.waitsForCycleId ? `cycle ${one.waitsForCycleId} (${one.waitsForSubsystem || "all subsystems"})` : "fewer running cycles",
      one === still[LISTED - 1] && queuedCycles > LISTED && `; and ${counted(queuedCycles - LISTED, "more cycle")}`,
    ].filter(Boolean).join(" "), 300)));
  }

  function draw() {
    const running = runningCycles();
    shown = choose(running);
    drawRunning(running);
    drawWaiting();
    hold.hidden = name.hidden = !shown;
    progress.hidden = !shown;
    progress.classList.toggle("over", Boolean(shown?.record));
    if (!shown) {
      setText(facts, model.status ? `No cycle has run yet. ${nextTick()}` : "");
      error.hidden = true;
      parts.draw([], { scale: 1 });
      return;
    }
    const { record } = shown;
    const list = shown.list();
    const elapsed = shown.elapsed();
    const ended = shown.ended();
    setText(name, `Cycle ${shown.cycleId}`);
    if (record) name.href = href("cycles", shown.cycleId);
    else name.removeAttribute("href");
    if (record) setBadge(state, cycleStateOf(record));
    else setBadge(state, "RUNNING");
    progress.max = Math.max(1, list.length);
    progress.value = ended;
    const failed = list.filter(hasFailed).length;
    setText(facts, [
      shown.startedBy(),
      record && list.length === 0 ? withoutParts(cycleStateOf(record)) : `${count(ended)} of ${counted(list.length, "subsystem")} ended`,
      failed && `${count(failed)} failed`,
      record ? cycleStateOf(record) !== "INTERRUPTED" && duration(elapsed) : `${(elapsed / 1000).toFixed(1)} s`,
      shown.dropped && `${counted(shown.dropped, "update")} lost`,
      held ? "held" : record && nextTick(),
    ].filter(Boolean).join(" · "));
    error.hidden = !record?.error;
    setText(error, visible(record?.error ?? "", 1000));
    const expected = shown.parts.size === plan?.subsystems?.length ? (plan.expectedDurationMs ?? 0) : 0;
    const scale = record ? elapsed || 1 : niceScale(Math.max(expected, elapsed * 1.05, 10));
    parts.draw(list, { scale, at: elapsed, critical: new Set(record?.criticalPath ?? []), levels, isOver: Boolean(record) });
  }

  function nextTick() {
    const due = (model.status?.loops ?? []).map(({ loop, nextDueAt }) => [instant(nextDueAt), loop.name]).filter(([at]) => at > now());
    due.sort((a, b) => a[0] - b[0]);
    return due.length ? `next: loop ${due[0][1]} in ${whole(due[0][0] - now())}` : "";
  }

  const size = () => shown?.parts.size ?? 0;
  const redraw = throttled(() => (size() > MANY ? 500 : 60), draw);
  const readPlan = throttled(() => (size() > MANY ? 60_000 : 5000), () => scope.attempt(async () => {
    plan = await getPlan();
    levels = new Map((plan.subsystems ?? []).map((one) => [one.name, one.level ?? 0]));
    redraw();
  }, replace(h("p"))));
  scope.signal.addEventListener("abort", () => {
    redraw.cancel();
    readPlan.cancel();
  });
  scope.on("live", redraw);
  scope.on("status", redraw);
  scope.on("recorded", readPlan);
  scope.on("reloaded", readPlan);
  // Bars of running parts grow between events.
  scope.every(100, () => model.running.size > 0 && redraw());
  scope.every(1000, redraw);
  readPlan();
  draw();
}

/** The scale grows in steps, so that the bars don't shrink continuously. */
function niceScale(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((step) => step >= ms);
}
