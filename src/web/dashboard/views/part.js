// One subsystem in one cycle: its part, its inputs, its output, and the changes in the output.

import { getCycle, getSubsystemWithOutput, listCycles, Refusal } from "../api.js";
import { add, h, replace, scrolling } from "../dom.js";
import { counted, duration, instant, lower, number, time, visible, word } from "../format.js";
import { diff, json } from "../json.js";
import { model } from "../model.js";
import { href } from "../route.js";
import { badge, reasonOf, sign, stateOf } from "../states.js";
import { neighbours } from "./cycle.js";

/** Most metrics and issues that are shown. */
const SHOWN = 200;

/** Most inputs that are looked up: a subsystem may have 1,024. */
const INPUTS = 50;

export const title = ({ parameters }) => `${parameters.name} in cycle ${parameters.id}`;

export function mount(main, { parameters: { id, name } }, scope) {
  const place = h("div", {}, h("p", { class: "summary", role: "status" }, "Reading the record …"));
  const links = neighbours(id, (number) => href("cycles", number, name), scope);
  add(links, h("a", { href: href("subsystems", name) }, "The subsystem now"));
  links.firstChild.after(h("a", { href: href("cycles", id) }, `All of cycle ${id}`));
  main.append(links, place);
  let isShown = false;
  const read = () => scope.attempt(async () => {
    const record = await getCycle(id);
    const part = await partOf(record, name);
    if (scope.signal.aborted) return;
    if (!part) {
      isShown = true;
      replace(place, h("p", { class: "quiet" }, `${visible(name)} took no part in cycle ${id}.`));
      return;
    }
    await show(place, record, part, scope);
    isShown = true;
  }, place);
  // It may still be running, or the service may be unreachable.
  scope.on("recorded", (record) => !isShown && record.cycleId === id && read());
  scope.on("reloaded", () => !isShown && read());
  if (model.connection !== "connecting") read();
}

async function show(place, record, part, scope) {
  const origin = instant(record.startedAt);
  const facts = [
    ["State", badge(stateOf(part))],
    ["Started", part.startedAt ? `${duration(instant(part.startedAt) - origin)} into the cycle` : "not called"],
    ["Duration", part.startedAt ? duration(part.durationMs ?? 0) : "–"],
    ["Queued", part.queuedMs ? duration(part.queuedMs) : "–"],
    ["Attempts", part.attempts ?? 0],
    ["Critical path", (record.criticalPath ?? []).includes(part.name) ? "on it" : "not on it"],
    part.errorCode && ["Error code", visible(part.errorCode, 100)],
  ].filter(Boolean);
  const reason = stateOf(part) === "SUCCEEDED" ? "" : reasonOf(part);
  const [before, output, inputs] = [h("section"), h("section"), h("section")];
  replace(place,
    h("dl", { class: "facts" }, facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value)))),
    reason && h("p", { class: "problem message" }, visible(reason, 1100)),
    issues(part.issues ?? []),
    metrics(part.metrics ?? {}),
    output, before, inputs);

  const [now, earlier] = await Promise.all([
    registered(part.name),
    lastSuccess(part.name, record.finishedAt),
  ]);
  if (scope.signal.aborted) return;
  showOutput(output, record, part, now);
  showDiff(before, record, part, earlier);
  await showInputs(inputs, record, part, now, scope);
}

/** The current subsystem; null if it is no longer registered. */
async function registered(name) {
  try {
    return await getSubsystemWithOutput(name);
  } catch (error) {
    if (error instanceof Refusal && error.status === "NOT_FOUND") return null;
    throw error;
  }
}

/** Its latest successful part before a time, with the cycle's record; null if none is retained. */
async function lastSuccess(name, finishedBefore) {
  if (!finishedBefore) return null;
  const { cycles } = await listCycles({ pageSize: 1, subsystem: name, subsystemStates: "SUBSYSTEM_STATE_SUCCEEDED", finishedBefore });
  const [record] = cycles;
  const part = record && await partOf(record, name);
  return part ? { id: record.cycleId, part } : null;
}

/** The part of a subsystem in a cycle, whose record may have it by a former name; undefined if it took no part. */
async function partOf({ subsystems = [] }, name) {
  const part = subsystems.find((one) => one.name === name);
  if (part) return part;
  const { formerNames = [] } = (await registered(name)) ?? {};
  return subsystems.find((one) => formerNames.includes(one.name));
}

function issues(list) {
  if (list.length === 0) return null;
  return h("section", {}, h("h2", {}, counted(list.length, "issue")),
    h("table", { class: "issues" }, h("caption", { class: "unseen" }, "Issues: problems that did not fail it"),
      h("thead", {}, h("tr", {}, ["Severity", "Code", "Message"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, list.slice(0, SHOWN).map((issue) => {
        const severity = word(issue.severity, "SEVERITY_") || "WARNING";
        return h("tr", {},
          h("td", {}, h("span", { class: "severity", "data-severity": severity }, lower(severity))),
          h("td", {}, h("code", {}, visible(issue.code, 200))), h("td", { class: "message" }, visible(issue.message, 2000)));
      }))),
    list.length > SHOWN && h("p", { class: "quiet" }, `… and ${list.length - SHOWN} more.`));
}

function metrics(values) {
  const all = Object.entries(values).sort(([a], [b]) => (a < b ? -1 : 1));
  if (all.length === 0) return null;
  return h("section", {}, h("h2", {}, counted(all.length, "metric")),
    h("table", { class: "pairs" }, h("caption", { class: "unseen" }, "Metrics"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Name"), h("th", { scope: "col", class: "number" }, "Value"))),
      h("tbody", {}, all.slice(0, SHOWN).map(([name, value]) =>
        h("tr", {}, h("th", { scope: "row" }, h("code", {}, visible(name, 200))), h("td", { class: "number" }, visible(number(value))))))),
    all.length > SHOWN && h("p", { class: "quiet" }, `… and ${all.length - SHOWN} more.`));
}

function showOutput(place, record, part, now) {
  add(place, h("h2", {}, "Output"));
  if (part.output !== undefined) {
    add(place, json(part.output, `Output of ${part.name} in cycle ${record.cycleId}`));
    return;
  }
  const why = stateOf(part) !== "SUCCEEDED" ? "It made no output in this cycle."
    : record.truncated ? "The output is not in the record, which would have been too large."
    : "The output is not in the record: neither the registration (record_output) nor the cycle (record_outputs) asked to record it.";
  if (!now?.outputCycleId) {
    add(place, h("p", {}, `${why} It has no latest output either.`));
    return;
  }
  if (now.outputHidden) {
    add(place, h("p", {}, `${why} Only operators see its latest output here.`));
    return;
  }
  const isThis = now.outputCycleId === record.cycleId;
  add(place, 
    h("p", {}, isThis ? "Not in the record, but still the latest known output." : `${why} Its latest output, of `,
      !isThis && h("a", { href: href("cycles", now.outputCycleId, part.name) }, `cycle ${now.outputCycleId}`), !isThis && ":"),
    json(now.output ?? {}, `Latest output of ${part.name}, of cycle ${now.outputCycleId}`));
}

function showDiff(place, record, part, earlier) {
  if (part.output === undefined) return;
  add(place, h("h2", {}, "Changes since its previous output"));
  if (!earlier) add(place, h("p", { class: "quiet" }, "It has no previous output, or the output is no longer retained."));
  else if (earlier.part?.output === undefined) {
    add(place, h("p", { class: "quiet" }, `The output of cycle ${earlier.id} is not in the record.`));
  } else {
    add(place, diff(earlier.part.output, part.output, {
      caption: "Changes", beforeLabel: `Cycle ${earlier.id}`, afterLabel: `Cycle ${record.cycleId}`,
    }));
  }
}

/**
 * Its inputs are derived from the record: the output of a subsystem that it requires or runs after, or that had ended
 * before it was called, is FRESH if that subsystem succeeded; otherwise it is the last output of any other cycle at
 * that time.
 */
async function showInputs(place, record, part, now, scope) {
  add(place, h("h2", {}, "Inputs"));
  const { requires = [], after = [], reads = [] } = now?.registration ?? {};
  const names = [...requires.map((name) => [name, "requires"]), ...after.map((name) => [name, "after"]), ...reads.map((name) => [name, "reads"])];
  if (!now) {
    add(place, h("p", { class: "quiet" }, "It is no longer registered, so its inputs are not known."));
    return;
  }
  if (names.length === 0) {
    add(place, h("p", { class: "quiet" }, "By its current registration, it reads no outputs of others."));
    return;
  }
  const parts = new Map((record.subsystems ?? []).map((one) => [one.name, one]));
  const rows = await Promise.all(names.slice(0, INPUTS).map(async ([name, relation]) => {
    const other = parts.get(name);
    const isInTime = relation !== "reads" || instant(other?.finishedAt) <= instant(part.startedAt);
    if (stateOf(other) === "SUCCEEDED" && isInTime) return { name, relation, freshness: "FRESH", id: record.cycleId, part: other };
    if (relation === "requires") return { name, relation, freshness: "ABSENT" };
    const last = await lastSuccess(name, part.startedAt ?? record.startedAt);
    return last ? { name, relation, freshness: "STALE", id: last.id, part: last.part } : { name, relation, freshness: "ABSENT" };
  }));
  if (scope.signal.aborted) return;
  add(place, 
    h("p", { class: "quiet" }, `By its current registration and the record${part.startedAt ? "" : "; it was not called in this cycle"}.`),
    scrolling("Inputs", h("table", {}, h("caption", { class: "unseen" }, "Inputs"),
      h("thead", {}, h("tr", {}, ["Subsystem", "Relation", "Freshness", "Made in", "Finished"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map(({ name, relation, freshness, id, part: made }) => h("tr", {},
        h("th", { scope: "row" }, h("a", { href: href("cycles", id ?? record.cycleId, name) }, visible(name))),
        h("td", {}, relation),
        h("td", {}, h("span", { class: "state", "data-state": freshness }, sign(freshness), h("span", {}, lower(freshness)))),
        h("td", {}, id ? h("a", { href: href("cycles", id) }, `cycle ${id}`) : "–"),
        h("td", { class: "time" }, made ? time(made.finishedAt) : "–")))))),
    names.length > INPUTS && h("p", { class: "quiet" }, `… and ${names.length - INPUTS} more.`),
    rows.filter((row) => row.part?.output !== undefined).map((row) =>
      h("details", {}, h("summary", {}, `${visible(row.name)}, ${lower(row.freshness)}, of cycle ${row.id}`),
        json(row.part.output, `Output of ${row.name} in cycle ${row.id}`))));
}
