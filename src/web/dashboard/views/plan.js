// The order of the next cycle: as a graph from top to bottom, level by level; or as a summary if it is too large to
// draw.

import { getPlan, listSubsystems } from "../api.js";
import { h, keyed, replace, s, scrolling, setText, throttled } from "../dom.js";
import { count, counted, duration, lower, visible, word } from "../format.js";
import { MANY, model } from "../model.js";
import { href } from "../route.js";

/** Most rows of the table at one time. */
const PAGE = 100;

/** Most edges that are drawn: more would be unreadable. */
const EDGES = 2000;

export const title = () => "Plan";

export function mount(main, _, scope) {
  const note = h("p", { class: "summary", role: "status" }, "Computing the plan …");
  const graph = h("section", { "aria-labelledby": "graph-title" });
  const search = h("input", { type: "search", id: "search", placeholder: "Name", autocomplete: "off", spellcheck: "false", oninput: () => table() });
  const rows = h("tbody");
  const rest = h("p", { class: "quiet" });
  const list = h("section", {}, h("h2", {}, "Each subsystem"),
    h("div", { class: "filters" }, h("label", { for: "search" }, "Search"), search),
    h("table", { class: "plan" }, h("caption", { class: "unseen" }, "The plan, by level and then by name"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Subsystem"), h("th", { scope: "col", class: "number" }, "Phase"), h("th", { scope: "col", class: "number" }, "Level"),
        h("th", { scope: "col", class: "number" }, "Expected"), h("th", { scope: "col", class: "wide" }, "Waits for, inside its phase"))), rows), rest);
  main.append(note, graph, list);
  /** @type {any} */
  let plan = null;
  let drawn = "";
  /** @type {ResizeObserver | null} */
  let observer = null;

  const read = throttled(() => ((plan?.subsystems?.length ?? 0) > MANY ? 30_000 : 3000), () => scope.attempt(async () => {
    plan = await getPlan();
    plan.subsystems ??= [];
    const reasons = new Map(plan.subsystems.map(({ name, skipReason }) => [name, word(skipReason, "SKIP_REASON_")]));
    for (const one of plan.subsystems) one.skipped = skipped(one, reasons);
    const areFew = plan.subsystems.length <= MANY;
    const registrations = areFew ? (await listSubsystems()).map((one) => one.registration) : [];
    if (scope.signal.aborted) return;
    setText(note, plan.subsystems.length === 0 ? "No subsystem is registered." :
      `${counted(plan.subsystems.length, "subsystem")} in ${counted(plan.levels ?? 0, "level")}` +
      (plan.expectedDurationMs ? `; the next cycle is expected to take ${duration(plan.expectedDurationMs)}, by recent durations.` : "; its duration is not known before it has run once."));
    // Expected durations change with every cycle; the graph is drawn again only if the order changes.
    const shape = JSON.stringify([plan.subsystems.map((one) => [one.name, one.level, one.phase, one.waitsFor, one.skipped]), plan.criticalPath, registrations.map((one) => [one.requires, one.after, one.reads])]);
    if (shape !== drawn) {
      drawn = shape;
      observer?.disconnect();
      if (plan.subsystems.length === 0) graph.replaceChildren();
      else if (areFew) observer = drawGraph(graph, plan, registrations);
      else drawLevels(graph, plan);
    }
    table();
  }, note));

  function table() {
    if (!plan) return;
    list.hidden = plan.subsystems.length === 0;
    const needle = search.value.trim().toLowerCase();
    const found = plan.subsystems.filter((one) => one.name.toLowerCase().includes(needle));
    const critical = new Set(plan.criticalPath ?? []);
    const shown = plan.subsystems.length > MANY ? found.slice(0, PAGE) : found;
    keyed(rows, shown, (one) => one.name,
      (one) => h("tr", {}, h("th", { scope: "row" }, h("a", { href: href("subsystems", one.name) }, visible(one.name)),
        h("span", { class: "critical-mark", title: "On the critical path" }, h("span", { class: "unseen" }, "on the critical path"))),
        h("td", { class: "number", "data-label": "Phase" }), h("td", { class: "number", "data-label": "Level" }), h("td", { class: "number", "data-label": "Expected" }), h("td", { class: "wide" })),
      (line, one) => {
        line.firstChild.lastChild.hidden = !critical.has(one.name);
        setText(line.children[1], String(one.phase ?? 0));
        setText(line.children[2], String(one.level ?? 0));
        setText(line.children[3], one.expectedDurationMs ? duration(one.expectedDurationMs) : "–");
        setText(line.children[4], one.skipped || visible((one.waitsFor ?? []).join(", "), 300));
      });
    setText(rest, shown.length < found.length ? `The first ${count(shown.length)} of ${count(found.length)}: use the search for others.` : found.length === 0 ? "No subsystem matches." : "");
  }

  scope.signal.addEventListener("abort", () => {
    read.cancel();
    observer?.disconnect();
  });
  scope.on("recorded", read);
  scope.on("reloaded", read);
  if (model.connection === "open") read();
}

/** Why it will not be called, where `reasons` has those of all, by name; empty if it will be. */
function skipped(one, reasons) {
  const reason = reasons.get(one.name);
  if (!reason) return one.breaker === "BREAKER_STATE_OPEN" ? "will not be called: its circuit breaker is open" : "";
  const ofRequired = {
    REQUIREMENT_MISSING: "is not registered",
    REQUIREMENT_LEFT_OUT: reasons.get(one.skipRequirement) === "SUSPENDED" ? "is suspended" : "will be skipped itself",
    REQUIREMENT_FAILED: "can't succeed",
  }[reason];
  return `will be skipped: ${ofRequired ? `it requires ${visible(one.skipRequirement)}, which ${ofRequired}` : lower(reason)}`;
}

/**
 * Levels from top to bottom, since any number of them fits into the width. The returned observer keeps the lines in
 * their places.
 */
function drawGraph(place, plan, registrations) {
  const critical = plan.criticalPath ?? [];
  const onPath = new Set(critical);
  const nodes = new Map();
  const lines = s("svg", { class: "edges", "aria-hidden": "true", focusable: "false" });
  const levels = [];
  for (const one of plan.subsystems) {
    levels[one.level ?? 0] ??= [];
    levels[one.level ?? 0].push(one);
  }

  let phase = NaN;
  const bands = levels.filter(Boolean).map((level) => {
    const isNew = (level[0].phase ?? 0) !== phase;
    phase = level[0].phase ?? 0;
    return h("li", { class: isNew ? "level new-phase" : "level" },
      h("span", { class: "phase" }, isNew ? `Phase ${phase}` : h("span", { class: "unseen" }, `Phase ${phase}`)),
      h("div", { class: "nodes" }, level.map((one) => {
        const node = h("a", { class: "node", "data-name": one.name, href: href("subsystems", one.name), "data-critical": onPath.has(one.name), "data-skipped": Boolean(one.skipped), title: one.skipped || null },
          visible(one.name), onPath.has(one.name) && h("span", { class: "unseen" }, ", on the critical path"));
        nodes.set(one.name, node);
        return node;
      })));
  });

  const known = registrations.filter((one) => nodes.has(one.name));
  const edges = known.flatMap((one) => [
    ...["requires", "after", "reads"].flatMap((relation) => (one[relation] ?? []).filter((name) => nodes.has(name)).map((name) => ({ from: name, to: one.name, relation }))),
  ]);
  const isStep = new Set(critical.slice(1).map((name, i) => `${critical[i]}>${name}`));
  const path = critical.slice(1).map((name, i) => ({ from: critical[i], to: name, relation: "critical" }));
  const order = edges.filter((edge) => edge.relation !== "reads" && !isStep.has(`${edge.from}>${edge.to}`)).slice(0, EDGES);

  const readout = h("p", { class: "readout", role: "status" });
  const silent = `Lines: requires and after. Bold: the critical path${critical.length ? `, ${counted(critical.length, "subsystem")} long` : ""}. Point at a subsystem, or tab to it, for its inputs and its readers.`;
  readout.textContent = silent;
  const picture = h("div", { class: "graph" }, lines, h("ol", {}, bands));
  const { activeElement } = document;
  const focused = activeElement instanceof HTMLElement && place.contains(activeElement) ? activeElement.dataset.name : undefined;
  replace(place, h("h2", { id: "graph-title" }, "Order"), readout, picture);

  let chosen = "";

  function draw() {
    const frame = picture.getBoundingClientRect();
    const box = new Map([...nodes].map(([name, node]) => [name, node.getBoundingClientRect()]));
    const line = ({ from, to, relation }) => {
      const [a, b] = [box.get(from), box.get(to)];
      if (!a || !b) return null;
      const [x1, x2] = [a.left + a.width / 2 - frame.left, b.left + b.width / 2 - frame.left];
      const isDown = b.top > a.top;
      const [y1, y2] = isDown ? [a.bottom - frame.top, b.top - frame.top] : [a.top - frame.top, b.bottom - frame.top];
      const bend = Math.max(12, Math.abs(y2 - y1) * 0.4) * (isDown ? 1 : -1);
      return s("path", { "data-relation": relation, d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` });
    };
    const mine = chosen ? edges.filter((edge) => edge.from === chosen || edge.to === chosen) : [];
    replace(lines, [...order, ...path].map(line), mine.map((edge) => line(edge)).map((path) => {
      path?.classList.add("chosen");
      return path;
    }));
    const near = new Set(mine.flatMap((edge) => [edge.from, edge.to]));
    picture.classList.toggle("choosing", Boolean(chosen));
    for (const [name, node] of nodes) node.classList.toggle("near", near.has(name) || name === chosen);
  }

  function choose(name) {
    if (name === chosen) return;
    chosen = name;
    draw();
    if (!name) {
      setText(readout, silent);
      return;
    }
    const one = known.find((each) => each.name === name) ?? {};
    const readers = edges.filter((edge) => edge.from === name).map((edge) => edge.to);
    const say = (label, names) => (names?.length ? `${label} ${names.join(", ")}` : "");
    setText(readout, visible(`${name}: ${[say("requires", one.requires), say("after", one.after), say("reads", one.reads), say("read by", [...new Set(readers)])].filter(Boolean).join("; ") || "no inputs and no readers"}.`, 2000));
  }

  for (const [name, node] of nodes) {
    node.addEventListener("mouseenter", () => choose(name));
    node.addEventListener("focus", () => choose(name));
    node.addEventListener("blur", () => choose(""));
    node.addEventListener("mouseleave", () => choose(""));
  }
  const observer = new ResizeObserver(draw);
  observer.observe(picture);
  // Focus stays on the same subsystem.
  nodes.get(focused)?.focus({ preventScroll: true });
  return observer;
}

function drawLevels(place, plan) {
  const levels = new Map();
  for (const one of plan.subsystems) {
    const level = one.level ?? 0;
    if (!levels.has(level)) levels.set(level, []);
    levels.get(level).push(one);
  }
  const critical = new Map((plan.criticalPath ?? []).map((name) => [plan.subsystems.find((one) => one.name === name)?.level ?? 0, name]));
  const widest = Math.max(...[...levels.values()].map((level) => level.length));
  const rows = [...levels].sort((a, b) => a[0] - b[0]);
  replace(place, h("h2", { id: "graph-title" }, "Order"),
    scrolling("Levels", h("table", { class: "levels" },
      h("caption", {}, `By level: all subsystems of a level can run at the same time${rows.length > PAGE ? `. The first ${PAGE} of ${count(rows.length)}` : ""}`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "number" }, "Level"), h("th", { scope: "col" }, "Phase"), h("th", { scope: "col", class: "number" }, "Subsystems"),
        h("th", { scope: "col", class: "wide" }, h("span", { class: "unseen" }, "Drawn")), h("th", { scope: "col", class: "number" }, "Longest expected"), h("th", { scope: "col" }, "Critical path"))),
      h("tbody", {}, rows.slice(0, PAGE).map(([level, group]) => {
        const phases = [...new Set(group.map((one) => one.phase ?? 0))];
        const name = critical.get(level);
        return h("tr", {}, h("th", { scope: "row", class: "number" }, level), h("td", {}, phases.length > 3 ? `${counted(phases.length, "phase")}` : phases.join(", ")),
          h("td", { class: "number" }, count(group.length)),
          h("td", { class: "wide", "aria-hidden": "true" }, h("div", { class: "meter", style: { width: `${(group.length / widest) * 100}%` } })),
          h("td", { class: "number" }, duration(group.reduce((longest, one) => Math.max(longest, one.expectedDurationMs ?? 0), 0))),
          h("td", {}, name && [h("span", { class: "critical-mark" }), h("a", { href: href("subsystems", name) }, visible(name))]));
      })))));
}
