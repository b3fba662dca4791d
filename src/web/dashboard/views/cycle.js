// One cycle: the times of its parts, and its failures with their reasons.

import { getCycle, getPlan } from "../api.js";
import { add, h, replace } from "../dom.js";
import { count, counted, duration, instant, lower, sentence, time, visible, word } from "../format.js";
import { MANY, model, newestId, partsOf } from "../model.js";
import { partsView } from "../parts.js";
import { href } from "../route.js";
import { badge, cycleStateOf, hasFailed, reasonOf, stateOf, withoutParts } from "../states.js";

/** Most failures that are listed with their reason above the chart. */
const LISTED = 20;

export const title = ({ parameters }) => `Cycle ${parameters.id}`;

export function mount(main, { parameters: { id } }, scope) {
  const place = h("div", {}, h("p", { class: "summary", role: "status" }, "Reading the record …"));
  main.append(neighbours(id, (number) => href("cycles", number), scope), place);
  let isShown = false;
  const read = () => scope.attempt(async () => {
    const record = await getCycle(id);
    if (scope.signal.aborted) return;
    isShown = true;
    replace(place);
    await show(place, record, scope);
  }, place);
  // It may still be running.
  scope.on("recorded", (record) => !isShown && record.cycleId === id && read());
  scope.on("reloaded", () => !isShown && read());
  if (model.connection !== "connecting") read();
}

/** Links to the previous and the next cycle. */
export function neighbours(id, link, scope) {
  const number = Number(id);
  const next = h("a", { href: link(number + 1), rel: "next" }, `Cycle ${number + 1}`);
  const update = () => (next.hidden = model.status !== null && number >= newestId());
  scope.on("status", update);
  update();
  return h("nav", { class: "neighbours", "aria-label": "Other cycles" },
    h("a", { href: href("cycles") }, "All cycles"),
    number > 1 && h("a", { href: link(number - 1), rel: "prev" }, `Cycle ${number - 1}`),
    next);
}

/** The cycle of another orchestrator, in which this one is a subsystem. */
const parentCycle = ({ orchestratorId, subsystem, epoch, cycleId }) =>
  `Cycle ${cycleId} of ${visible(orchestratorId, 128)}, epoch ${epoch}, as its subsystem ${visible(subsystem)}`;

async function show(place, record, scope) {
  const parts = partsOf(record);
  const failed = parts.filter(hasFailed);
  const isInterrupted = cycleStateOf(record) === "INTERRUPTED";
  const late = instant(record.startedAt) - instant(record.scheduledAt);
  const facts = [
    ["State", badge(cycleStateOf(record))],
    ["Trigger", record.loop ? `loop ${visible(record.loop)}` : lower(word(record.trigger, "TRIGGER_")) || "not known"],
    ["Due", time(record.scheduledAt)],
    ["Started", record.startedAt ? `${time(record.startedAt)}${late > 1 ? ` (${duration(late)} later)` : ""}` : "not known"],
    ["Finished", time(record.finishedAt)],
    ["Duration", isInterrupted ? "not known" : record.startedAt ? duration(record.durationMs ?? 0) : "–"],
    ["Subsystems", isInterrupted ? "not known" : count(parts.length)],
    ["Epoch", record.epoch],
    ["Revision", record.revision],
    record.parent && ["Parent", parentCycle(record.parent)],
    record.triggeredBy && ["Triggered by", visible(record.triggeredBy, 300)],
    record.requestId && ["Request id", visible(record.requestId, 128)],
  ].filter(Boolean);
  add(place, h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
  // A summary of failures adds nothing to their list.
  if (record.error && failed.length === 0) add(place, h("p", { class: "problem" }, visible(record.error, 1000)));
  if (record.truncated) add(place, h("p", { class: "quiet" }, "The record was too large, so outputs, issues, metrics or the ends of messages were left out."));
  if (parts.length === 0) {
    add(place, h("p", { class: "quiet" }, sentence(withoutParts(cycleStateOf(record)))));
    return;
  }
  if (failed.length) add(place, failures(record, failed));
  const view = partsView({ caption: `Cycle ${record.cycleId}: the part of each subsystem`, href: (name) => href("cycles", record.cycleId, name), details: true });
  add(place, h("h2", {}, "Timeline"), view.element, record.criticalPath?.length && criticalPath(record, parts));
  const options = { scale: record.durationMs || 1, critical: new Set(record.criticalPath ?? []), isOver: true };
  view.draw(parts, options);
  if (parts.length > MANY) {
    await scope.attempt(async () => {
      const plan = await getPlan();
      view.draw(parts, { ...options, levels: new Map((plan.subsystems ?? []).map((one) => [one.name, one.level ?? 0])) });
    }, h("p"));
  }
}

function failures(record, failed) {
  return h("section", {},
    h("h2", {}, counted(failed.length, "failure")),
    h("ul", { class: "failures" }, failed.slice(0, LISTED).map((part) =>
      h("li", {}, badge(stateOf(part)), h("a", { href: href("cycles", record.cycleId, part.name) }, visible(part.name)),
        h("span", { class: "message" }, visible(reasonOf(part), 1100))))),
    failed.length > LISTED && h("p", { class: "quiet" }, `… and ${count(failed.length - LISTED)} more: choose “failed” below.`));
}

function criticalPath(record, parts) {
  const byName = new Map(parts.map((part) => [part.name, part]));
  return h("section", {},
    h("h2", {}, "Critical path"),
    h("p", { class: "quiet" }, "Each subsystem waited for the previous one, and the last one ended last: speeding up one of them makes the cycle faster."),
    h("ol", { class: "path" }, record.criticalPath.map((name) => {
      const part = byName.get(name);
      return h("li", {}, h("a", { href: href("cycles", record.cycleId, name) }, visible(name)), " ",
        h("span", { class: "quiet" }, part ? duration(part.durationMs ?? 0) : ""));
    })));
}
