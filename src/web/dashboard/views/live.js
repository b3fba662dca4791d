// The cycle that runs, as it runs; and the last one, until the next starts.

import { getPlan } from "../api.js";
import { h, replace, setText, throttled } from "../dom.js";
import { count, counted, duration, instant, lower, visible, whole, word } from "../format.js";
import { liveOf, MANY, model, now } from "../model.js";
import { partsView } from "../parts.js";
import { href } from "../route.js";
import { cycleStateOf, hasFailed, setBadge, badge } from "../states.js";

export const title = () => "Live";

export function mount(main, _, scope) {
  /** @type {any} */
  let plan = null;
  let levels = new Map();
  /** @type {typeof model.live} */
  let held = null;
  /** @type {typeof model.live} */
  let shown = null;

  const state = badge("NONE", "no cycle");
  const name = h("a", { class: "cycle-name" });
  const progress = h("progress", { "aria-label": "Subsystems whose part has ended", max: 1, value: 0 });
  const facts = h("p", { class: "summary" });
  const hold = h("button", { type: "button", id: "hold", "aria-pressed": "false", onclick: () => {
    held = held ? null : shown;
    hold.setAttribute("aria-pressed", String(Boolean(held)));
    draw();
  } }, "Hold this cycle");
  const error = h("p", { class: "problem", hidden: true });
  const parts = partsView({ caption: "The running cycle: how each subsystem's part stands", href: (part) => href("subsystems", part) });
  main.append(h("div", { class: "headline" }, name, state, hold), progress, facts, error, parts.element);

  function draw() {
    shown = held ?? model.live ?? (model.status?.lastCycle ? liveOf(model.status.lastCycle) : null);
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
    const ended = record ? list.length : list.filter((part) => part.end !== undefined).length;
    setText(name, `Cycle ${shown.cycleId}`);
    if (record) name.href = href("cycles", shown.cycleId);
    else name.removeAttribute("href");
    if (record) setBadge(state, cycleStateOf(record));
    else setBadge(state, "RUNNING");
    progress.max = Math.max(1, list.length);
    progress.value = ended;
    const trigger = shown.loop ? `loop ${shown.loop}` : lower(word(shown.trigger, "TRIGGER_")) || "unknown trigger";
    const failed = list.filter(hasFailed).length;
    setText(facts, [
      trigger,
      `${count(ended)} of ${counted(list.length, "subsystem")} ended`,
      failed && `${count(failed)} failed`,
      record ? duration(elapsed) : `${(elapsed / 1000).toFixed(1)} s`,
      shown.dropped && `${counted(shown.dropped, "update")} lost on the way`,
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

  const size = () => model.live?.parts.size ?? 0;
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
  // Bars of those that run grow between events.
  scope.every(100, () => !held && model.live && !model.live.record && redraw());
  scope.every(1000, redraw);
  readPlan();
  draw();
}

/** Grows in steps, so that the bars don't shrink all the time. */
function niceScale(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((step) => step >= ms);
}
