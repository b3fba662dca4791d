// One subsystem: its registration, its state, its latest output, and its last parts.

import { getSubsystem, getSubsystemWithOutput, listCycles } from "../api.js";
import { h, replace, throttled } from "../dom.js";
import { counted, duration, instant, lower, milliseconds, setting, time, visible, whole, word } from "../format.js";
import { json } from "../json.js";
import { model, now } from "../model.js";
import { href } from "../route.js";
import { badge, hasFailed, reasonOf, stateOf } from "../states.js";
import { freshness } from "./fleet.js";

/** Most of its last parts that are listed. */
const PARTS = 20;

export const title = ({ parameters }) => parameters.name;

export function mount(main, { parameters: { name } }, scope) {
  const place = h("div", {}, h("p", { class: "summary", role: "status" }, "Reading the registration …"));
  const [facts, problem, settings, parts, output, snapshot] = Array.from({ length: 6 }, () => h("section"));
  main.append(h("nav", { class: "neighbours", "aria-label": "Elsewhere" },
    h("a", { href: href("fleet") }, "All subsystems"), h("a", { href: href("cycles", { subsystem: name }) }, "Its cycles")), place);

  // Its present and former names, by which records have it.
  let names = [name];
  const read = () => scope.attempt(async () => {
    const [one, page] = await Promise.all([
      getSubsystemWithOutput(name),
      listCycles({ subsystem: name, pageSize: PARTS }),
    ]);
    if (scope.signal.aborted) return;
    names = [name, ...(one.formerNames ?? [])];
    if (!facts.isConnected) replace(place, facts, problem, parts, output, snapshot, settings);
    showFacts(facts, one);
    const reason = one.last && stateOf(one.last) !== "SUCCEEDED" ? reasonOf(one.last) : "";
    replace(problem, reason && h("p", { class: "problem message" }, visible(reason, 1100)));
    showParts(parts, names, page);
    showOutput(output, one);
    showSettings(settings, one);
  }, place);

  replace(snapshot, h("h2", {}, "Its own status"), h("button", { type: "button", onclick: () => ask() }, "Query now"), h("div", { role: "status" }));
  const ask = () => scope.attempt(async () => {
    const one = await getSubsystem(name, { includeSnapshot: true });
    if (scope.signal.aborted) return;
    replace(snapshot.lastChild, one.snapshotError
      ? h("p", { class: "problem message" }, visible(one.snapshotError, 1000))
      : json(one.snapshot ?? {}, `Status of ${name}`));
  }, snapshot.lastChild);

  const reread = throttled(2000, read);
  scope.signal.addEventListener("abort", () => reread.cancel());
  scope.on("recorded", (record) => (record.subsystems ?? []).some((part) => names.includes(part.name)) && reread());
  scope.on("reloaded", reread);
  if (model.connection === "open") read();
}

function showFacts(place, one) {
  const { last, registration } = one;
  const facts = [
    ["Last part", badge(stateOf(last) || "NONE", last ? lower(stateOf(last)) : "not run yet")],
    ["In cycle", one.lastCycleId ? h("a", { href: href("cycles", one.lastCycleId, last?.name ?? registration.name) }, one.lastCycleId) : "–"],
    ["Duration", last?.startedAt ? duration(last.durationMs ?? 0) : "–"],
    ["Breaker", registration.breaker?.disabled ? "none" : lower(word(one.breaker, "BREAKER_STATE_"))],
    ["Latest output", one.outputCycleId ? `${lower(freshness(one))}, cycle ${one.outputCycleId}` : "absent"],
    ["Suspended", one.suspended ? "yes" : "no"],
    ["Lease", one.leaseExpiresAt ? `ends in ${whole(instant(one.leaseExpiresAt) - now())}` : "none"],
    ["Initialized", one.initialized ? "yes" : "no"],
    ["Declared by", one.origin === "ORIGIN_CONFIG" ? "configuration" : "RPC"],
    ["Owner", one.owner ? visible(one.owner, 300) : "none"],
    ...(one.formerNames ? [["Formerly", one.formerNames.map((former) => visible(former)).join(", ")]] : []),
  ];
  replace(place, h("dl", { class: "facts" }, facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value)))));
}

function showParts(place, names, { cycles, unreadable }) {
  const rows = cycles.map((cycle) => ({ cycle, part: cycle.subsystems.find((part) => names.includes(part.name)) }));
  const longest = Math.max(...rows.map(({ part }) => part?.durationMs ?? 0), 1);
  replace(place, h("h2", {}, "Last parts"), rows.length === 0 ? h("p", { class: "quiet" }, "It took part in no retained cycle.") :
    h("table", { class: "last" }, h("caption", { class: "unseen" }, "Its parts in the latest cycles"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Cycle"), h("th", { scope: "col" }, "State"), h("th", { scope: "col" }, "Finished"),
        h("th", { scope: "col", class: "number" }, "Duration"), h("th", { scope: "col", class: "wide" }, h("span", { class: "unseen" }, "Drawn")),
        h("th", { scope: "col", class: "number" }, "Attempts"), h("th", { scope: "col" }, "Error"))),
      h("tbody", {}, rows.map(({ cycle, part }) => h("tr", { class: hasFailed(part) ? "failed" : null },
        h("th", { scope: "row" }, h("a", { href: href("cycles", cycle.cycleId, part?.name ?? names[0]) }, cycle.cycleId)),
        h("td", {}, badge(stateOf(part))),
        h("td", { class: "time", "data-label": "Finished" }, time(part?.finishedAt ?? cycle.finishedAt)),
        h("td", { class: "number", "data-label": "Duration" }, part?.startedAt ? duration(part.durationMs ?? 0) : "–"),
        h("td", { class: "wide", "aria-hidden": "true" },
          h("div", { class: "meter", "data-state": stateOf(part), style: { width: `${((part?.durationMs ?? 0) / longest) * 100}%` } })),
        h("td", { class: "number", "data-label": "Attempts" }, part?.attempts ?? 0),
        h("td", { class: "reason", title: visible(reasonOf(part), 1000) || null }, visible(reasonOf(part), 300)))))),
    unreadable.length > 0 && h("p", { class: "problem" },
      `Missing, because their records are damaged and can't be read: ${unreadable.map(({ cycleId = "?" }) => `cycle ${cycleId}`).join(", ")}.`));
}

function showOutput(place, one) {
  const { name } = one.registration;
  const shown = one.outputCycleId ?? "";
  if (place.dataset.cycle === shown) return;
  place.dataset.cycle = shown;
  replace(place, h("h2", {}, "Latest output"), shown
    ? [h("p", { class: "quiet" }, "Made in ", h("a", { href: href("cycles", shown, name) }, `cycle ${shown}`), one.outputHidden ? ". Only operators see it here." : "."),
      !one.outputHidden && json(one.output ?? {}, `Latest output of ${name}`)]
    : h("p", { class: "quiet" }, "It has no output."));
}

function showSettings(place, one) {
  const it = one.registration;
  const links = (names = []) => (names.length ? names.slice(0, 200).flatMap((name, i) => [i ? ", " : "", h("a", { href: href("subsystems", name) }, visible(name))]) : "none");
  const retry = it.retry ?? {};
  const breaker = it.breaker ?? {};
  const limits = it.limits ?? {};
  const rows = [
    ["Endpoint", h("code", {}, visible(it.endpoint, 500))],
    ["Phase", String(it.phase ?? 0)],
    ["Requires", links(it.requires)],
    ["After", links(it.after)],
    ["Reads", links(it.reads)],
    ["Timeout", setting(milliseconds(it.timeout))],
    ["Retry", `${counted(retry.maxAttempts ?? 1, "attempt")}, waiting ${setting(milliseconds(retry.initialBackoff))} to ${setting(milliseconds(retry.maxBackoff))}, on ${(retry.retryableStatusCodes ?? []).join(", ") || "none"}`],
    ["Breaker", breaker.disabled ? "none" : `opens after ${counted(breaker.failureThreshold, "consecutive failure")}, for ${setting(milliseconds(breaker.openFor))}`],
    ["Critical", it.critical ? "yes: a cycle in which it fails is failed" : "no"],
    ["Output in the record", it.recordOutput ? "always" : "only if the cycle requests it"],
    ["Limits", `message ${counted(limits.maxMessageBytes, "byte")}, output ${counted(limits.maxOutputBytes, "byte")}, ${counted(limits.maxMetrics, "metric")}, ${counted(limits.maxIssues, "issue")}`],
  ];
  replace(place, h("h2", {}, "Registration"), h("dl", { class: "settings" }, rows.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value)))),
    one.redacted && h("p", { class: "quiet" }, "Only its owner and operators see its parameters."),
    it.parameters && [h("h3", {}, "Parameters"), json(it.parameters, `Parameters of ${it.name}`)]);
}
