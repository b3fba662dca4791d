// The fleet: every subsystem, the state of its last part, and the age of its output.

import { listSubsystems } from "../api.js";
import { stacked } from "../charts.js";
import { h, keyed, replace, setAttribute, setText, throttled } from "../dom.js";
import { count, counted, duration, instant, lower, visible, whole, word } from "../format.js";
import { fleetSize, liveCycle, MANY, model, now, on, RECENT_SUBSYSTEMS, runningCycles } from "../model.js";
import { href, setQuery } from "../route.js";
import { badge, hasFailed, reasonOf, setBadge, sign, standing, stateOf } from "../states.js";

/** Most rows at one time: more would be slow to draw. */
const PAGE = 100;

/**
 * Filters in addition to the state of the last part.
 * @type {Record<string, [string, (one: any) => boolean]>}
 */
const SPECIAL = {
  SUSPENDED: ["suspended", (one) => one.suspended],
  BREAKER: ["breaker not closed", (one) => one.breaker !== "BREAKER_STATE_CLOSED"],
  STALE: ["output stale or absent", (one) => freshness(one) !== "FRESH"],
};

const STATES = ["FAILED", "TIMED_OUT", "CIRCUIT_OPEN", "SKIPPED_FOR_A_FAILURE", "SKIPPED", "CANCELLED", "SUCCEEDED", "NONE"];

const nameOf = (one) => one.registration.name;

/** @type {{ id: string, title: string, number?: boolean, value?: (one: any) => string | number }[]} */
const COLUMNS = [
  { id: "name", title: "Subsystem", value: nameOf },
  { id: "state", title: "Last part", value: (one) => STATES.indexOf(shownState(one)) },
  { id: "recent", title: "Recent cycles" },
  { id: "duration", title: "Duration", number: true, value: (one) => -(one.last?.durationMs ?? -1) },
  { id: "breaker", title: "Breaker", value: (one) => one.breaker },
  { id: "output", title: "Latest output", value: (one) => Number(one.outputCycleId ?? 0) },
  { id: "phase", title: "Phase", number: true, value: (one) => one.registration.phase ?? 0 },
];

export const title = () => "Fleet";

/** The freshness of its output: made in its last cycle, earlier, or never. */
export function freshness(one) {
  if (!one.outputCycleId) return "ABSENT";
  return Number(one.outputCycleId) >= Number(one.lastCycleId ?? 0) ? "FRESH" : "STALE";
}

function shownState(one) {
  return standing(one.last);
}

/**
 * The known state of the fleet; it outlives the view, so that returning to it is instant.
 * @type {{ all: any[], isWhole: boolean }}
 */
const known = { all: [], isWhole: false };

on("recorded", (record) => {
  const parts = new Map((record.subsystems ?? []).map((part) => [part.name, part]));
  for (const one of known.all) {
    const part = parts.get(one.registration.name);
    if (!part) continue;
    one.last = part;
    one.lastCycleId = record.cycleId;
    if (stateOf(part) === "SUCCEEDED") one.outputCycleId = record.cycleId;
  }
});

export function mount(main, route, scope) {
  const query = { q: route.query.get("q") ?? "", state: route.query.get("state") ?? "", sort: route.query.get("sort") ?? "name" };
  let page = 0;

  const facts = h("dl", { class: "facts" });
  const summary = h("p", { class: "summary", role: "status" }, "Reading the fleet …");
  const bar = h("div");
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Filter by the last part" });
  const search = h("input", { type: "search", id: "search", placeholder: "Name", value: query.q, autocomplete: "off", spellcheck: "false" });
  const heads = COLUMNS.map((column) =>
    h("th", { scope: "col", class: column.number ? "number" : null },
      column.value ? h("button", { type: "button", onclick: () => sortBy(column.id) }, column.title) : column.title));
  const rows = h("tbody");
  const table = h("table", { class: "fleet" }, h("caption", { class: "unseen" }, "Subsystems and their last part"),
    h("thead", {}, h("tr", {}, heads)), rows);
  const pager = h("nav", { class: "pager", "aria-label": "Pages of subsystems", hidden: true });
  const nothing = h("p", { class: "quiet empty", hidden: true }, "No subsystem matches the filter.");

  main.append(
    facts, summary, bar,
    h("div", { class: "filters" }, h("label", { for: "search" }, "Search"), search, chips),
    table, nothing, pager,
  );

  search.addEventListener("input", () => {
    query.q = search.value;
    page = 0;
    refilter();
  });

  function sortBy(id) {
    query.sort = query.sort === id ? `-${id}` : id;
    refilter();
  }

  function refilter() {
    setQuery({ ...query, sort: query.sort === "name" ? "" : query.sort });
    draw();
  }

  function draw() {
    drawFacts();
    const counts = {};
    for (const one of known.all) counts[shownState(one)] = (counts[shownState(one)] ?? 0) + 1;
    drawSummary(counts);
    drawChips(counts);

    const needle = query.q.trim().toLowerCase();
    const passes = SPECIAL[query.state]?.[1] ?? (query.state ? (one) => shownState(one) === query.state : () => true);
    const found = known.all.filter((one) => passes(one) && (!needle || one.registration.name.toLowerCase().includes(needle)));
    const isDown = query.sort.startsWith("-");
    const column = COLUMNS.find(({ id, value }) => value && id === query.sort.replace("-", "")) ?? COLUMNS[0];
    const by = column.value ?? nameOf;
    found.sort((a, b) => compare(by(a), by(b)) * (isDown ? -1 : 1) || compare(nameOf(a), nameOf(b)));
    for (const [i, head] of heads.entries()) {
      setAttribute(head, "aria-sort", COLUMNS[i] === column ? (isDown ? "descending" : "ascending") : null);
    }

    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    keyed(rows, found.slice(page * PAGE, (page + 1) * PAGE), (one) => one.registration.name, row, (line, one) => update(line, one, model.recent));
    table.classList.toggle("without-recent", fleetSize() > RECENT_SUBSYSTEMS);
    table.hidden = found.length === 0;
    nothing.hidden = found.length > 0 || known.all.length === 0;
    drawPager(found.length, pages);
  }

  function drawFacts() {
    const { status } = model;
    if (!status) return;
    const running = runningCycles();
    const loops = status.loops ?? [];
    const items = [
      ["Cycles", count(status.totalCycles), href("cycles")],
      ["Running", inShort(running), href("live")],
      ["Waiting", count(status.queuedCycles), href("live")],
      ["Loops", loops.length ? `${count(loops.filter((loop) => !loop.stopped && !loop.paused).length)} of ${count(loops.length)} running` : "none", href("loops")],
      ["Watchers", count(status.watchers)],
      ["Up", whole(now() - instant(status.startedAt))],
      ["Epoch", status.epoch],
      ["Version", status.version],
    ];
    keyed(facts, items, ([name]) => name,
      ([name, , link]) => h("div", {}, h("dt", {}, name), h("dd", {}, link ? h("a", { href: link }) : h("span"))),
      (item, [, value]) => setText(item.lastChild.firstChild, visible(value, 60)));
  }

  function drawSummary(counts) {
    if (!known.all.length) {
      if (known.isWhole) setText(summary, "No subsystem is registered.");
      bar.replaceChildren();
      return;
    }
    const failed = known.all.filter((one) => one.last && hasFailed(one.last)).length;
    const text = `${counted(known.all.length, "subsystem")}${known.isWhole ? "" : " so far"}: ` +
      (counts.NONE === known.all.length ? "no subsystem has run yet." : failed ? `${count(failed)} failed in their last cycle.` : "none failed in their last cycle.");
    setText(summary, text);
    replace(bar, stacked(counts, STATES, "Last parts"));
  }

  function drawChips(counts) {
    const special = Object.entries(SPECIAL).map(([id, [text, passes]]) => [id, text, known.all.filter(passes).length]);
    const items = [["", "all", known.all.length], ...STATES.map((id) => [id, id === "NONE" ? "not run yet" : lower(id), counts[id] ?? 0]), ...special]
      .filter(([id, , number]) => number || id === "" || id === query.state);
    keyed(chips, items, ([id]) => id || "all",
      ([id, text]) => h("button", { type: "button", class: "chip", "data-state": id, onclick: () => {
        query.state = id;
        page = 0;
        refilter();
      } }, id && id in SPECIAL === false && sign(id), h("span", {}, text), h("span", { class: "count" })),
      (chip, [id, , number]) => {
        setText(chip.lastChild, count(number));
        setAttribute(chip, "aria-pressed", String(id === query.state));
      });
  }

  function drawPager(found, pages) {
    pager.hidden = pages < 2;
    if (pager.hidden) return;
    const step = (to, text, rel) => h("button", { type: "button", rel, disabled: to < 0 || to >= pages, onclick: () => {
      page = to;
      draw();
      table.scrollIntoView({ block: "nearest" });
    } }, text);
    const at = document.activeElement?.getAttribute("rel");
    const isInside = pager.contains(document.activeElement);
    replace(pager, step(page - 1, "Before", "prev"),
      h("span", {}, `${count(page * PAGE + 1)} to ${count(Math.min(found, (page + 1) * PAGE))} of ${count(found)}`),
      step(page + 1, "After", "next"));
    if (isInside) pager.querySelector(`[rel=${at}]:not(:disabled)`)?.focus();
  }

  async function read() {
    await scope.attempt(async () => {
      const all = await listSubsystems((some) => {
        if (scope.signal.aborted || known.isWhole) return;
        known.all = some;
        draw();
      });
      known.all = all;
      known.isWhole = true;
      if (!scope.signal.aborted) draw();
    }, summary);
  }

  const redraw = throttled(() => (fleetSize() > MANY ? 1000 : 150), draw);
  // Events don't include breakers, leases and registrations.
  const reread = throttled(() => (fleetSize() > MANY ? 20_000 : 1000), read);
  scope.signal.addEventListener("abort", () => {
    redraw.cancel();
    reread.cancel();
  });
  scope.on("status", redraw);
  scope.on("live", redraw);
  scope.on("recorded", reread);
  scope.on("reloaded", () => {
    known.isWhole = false;
    reread();
  });
  scope.every(1000, redraw);
  draw();
  if (model.connection === "open") read();
}

/** The running cycles, and the number of their parts that have ended. */
function inShort(running) {
  if (running.length === 0) return "none";
  const sum = (of) => count(running.reduce((all, live) => all + of(live), 0));
  const which = running.length === 1 ? `cycle ${running[0].cycleId}` : counted(running.length, "cycle");
  return `${which}, ${sum((live) => live.ended())} of ${sum((live) => live.parts.size)}`;
}

function compare(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}

function row(one) {
  const { name } = one.registration;
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: href("subsystems", name) }, visible(name)), h("span", { class: "note" })),
    h("td", {}, badge("NONE"), h("span", { class: "reason" })),
    h("td", { class: "strip", "data-label": "Recent cycles" }),
    h("td", { class: "number", "data-label": "Duration" }),
    h("td", { "data-label": "Breaker" }),
    h("td", { "data-label": "Latest output" }, h("span"), h("a")),
    h("td", { class: "number", "data-label": "Phase" }));
}

function update(line, one, recent) {
  const [name, state, strip, lasted, breaker, output, phase] = line.children;
  const { last, registration } = one;
  const notes = [
    one.suspended && "suspended",
    registration.critical && "critical",
    one.leaseExpiresAt && `lease ${whole(instant(one.leaseExpiresAt) - now())}`,
  ].filter(Boolean);
  setText(name.lastChild, notes.join(", "));
  const shown = shownState(one);
  setBadge(state.firstChild, shown, shown === "NONE" ? "not run yet" : lower(stateOf(last)));
  const reason = last && shown !== "SUCCEEDED" ? visible(reasonOf(last), 300) : "";
  setText(state.lastChild, reason);
  setAttribute(state.lastChild, "title", reason || null);
  line.classList.toggle("failed", Boolean(last && hasFailed(last)));
  line.classList.toggle("with-reason", reason !== "");
  drawStrip(strip, registration.name, recent);
  setText(lasted, last?.startedAt ? duration(last.durationMs ?? 0) : "–");
  const stands = word(one.breaker, "BREAKER_STATE_");
  setText(breaker, registration.breaker?.disabled ? "none" : lower(stands));
  breaker.dataset.breaker = stands;
  drawOutput(output, one);
  setText(phase, String(registration.phase ?? 0));
}

function drawOutput(cell, one) {
  const fresh = freshness(one);
  const id = one.outputCycleId ?? "";
  const [text, link] = cell.children;
  const at = madeAt(one);
  const age = Number.isFinite(at) ? `${whole(now() - at)} ago` : "";
  setText(text, fresh === "ABSENT" ? "absent" : [fresh === "STALE" ? "stale" : "", age].filter(Boolean).join(", "));
  cell.dataset.freshness = fresh;
  setText(link, id && `cycle ${id}`);
  setAttribute(link, "href", id ? href("cycles", id, one.registration.name) : null);
}

/** When its latest output was made, if known. */
function madeAt(one) {
  const id = one.outputCycleId;
  if (!id) return NaN;
  if (id === one.lastCycleId) return instant(one.last?.finishedAt);
  const live = liveCycle(id);
  if (live) return live.startedAt + (live.parts.get(one.registration.name)?.end ?? NaN);
  return instant(model.recent.find((cycle) => cycle.id === id)?.finishedAt);
}

/** One bar for each cycle, newest at the right: short if it succeeded, otherwise tall. */
function drawStrip(cell, name, recent) {
  const drawn = `${recent.at(0)?.id} ${recent.at(-1)?.id} ${recent.length}`;
  if (cell.dataset.drawn === drawn) return;
  cell.dataset.drawn = drawn;
  const states = recent.map((cycle) => (cycle.parts ? (cycle.parts.get(name) ?? "") : "UNREADABLE"));
  const unreadable = states.filter((state) => state === "UNREADABLE").length;
  const ran = states.filter(Boolean).length - unreadable;
  const good = states.filter((state) => state === "SUCCEEDED").length;
  const words = `${good} of ${ran} succeeded${unreadable ? `; ${counted(unreadable, "record")} can't be read` : ""}`;
  replace(cell, ran + unreadable > 0 && h("span", { class: "ticks", role: "img", "aria-label": words, title: words },
    states.map((state) => h("i", { "data-state": state || "ABSENT" }))));
}
