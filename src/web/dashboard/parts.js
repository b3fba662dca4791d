// The parts of one cycle, running or ended: as a Gantt chart, or as a summary if there are too many.

import { concurrency, gantt } from "./gantt.js";
import { profile, stacked } from "./charts.js";
import { h, keyed, replace, scrolling, setAttribute, setText } from "./dom.js";
import { count, counted, duration, lower } from "./format.js";
import { MANY } from "./model.js";
import { hasFailed, SUBSYSTEM_STATES, sign, tally } from "./states.js";

/** Most rows at one time. */
const PAGE = 100;

const lasted = (part) => (part.end ?? 0) - (part.start ?? 0);

/** Filters for many parts. */
const CHOICES = {
  all: ["all", (parts) => parts],
  failed: ["failed", (parts) => parts.filter(hasFailed)],
  running: ["running", (parts) => parts.filter((part) => part.state === "SUBSYSTEM_STATE_RUNNING")],
  critical: ["critical path", (parts, critical) => parts.filter((part) => critical.has(part.name))],
  slowest: ["slowest first", (parts) => parts.filter((part) => part.end !== undefined).sort((a, b) => lasted(b) - lasted(a))],
  notable: ["failed, then slowest", (parts) => parts.filter((part) => part.end !== undefined || hasFailed(part))
    .sort((a, b) => Number(hasFailed(b)) - Number(hasFailed(a)) || lasted(b) - lasted(a))],
};

/**
 * The parts of a cycle, with `draw(parts, { scale, at, critical, levels })`. `levels` are those of the plan, by name,
 * if known.
 */
export function partsView({ caption, href, details = false }) {
  // A few parts are all shown; of many, the most important ones first.
  let chosen = "";
  let choice = "all";
  let needle = "";
  let page = 0;
  /** @type {[any[], any] | null} */
  let drawn = null;

  const counts = h("div", { class: "legend" });
  const levelsTable = h("table", { class: "levels" },
    h("caption", { class: "unseen" }, "By level of the plan"),
    h("thead", {}, h("tr", {}, ["Level", "Subsystems", "How they stand", "Failed", "From", "To"].map((text, i) =>
      h("th", { scope: "col", class: i === 2 ? "wide" : "number" }, text)))),
    h("tbody"));
  const levelsBox = h("details", { hidden: true, open: true }, h("summary", {}, "By level of the plan"), scrolling("Levels", levelsTable));
  const shape = h("div");
  const search = h("input", { type: "search", id: "search", placeholder: "Name", autocomplete: "off", spellcheck: "false", oninput: () => {
    needle = search.value.trim().toLowerCase();
    page = 0;
    redraw();
  } });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Which of them" });
  const filters = h("div", { class: "filters" }, h("label", { for: "search" }, "Search"), search, chips);
  const chart = gantt({ caption, href, details });
  const nothing = h("p", { class: "quiet empty", hidden: true }, "No subsystem matches the filter.");
  const pager = h("div", { class: "pager", hidden: true },
    h("button", { type: "button", onclick: () => turn(-1) }, "Before"), h("span"), h("button", { type: "button", onclick: () => turn(1) }, "After"));
  const element = h("div", { class: "parts" }, counts, shape, levelsBox, filters, chart.element, nothing, pager);

  function turn(by) {
    page += by;
    redraw();
  }

  function redraw() {
    if (drawn) draw(...drawn);
  }

  function draw(parts, options) {
    drawn = [parts, options];
    const { critical = new Set(), levels = new Map(), scale } = options;
    const areMany = parts.length > MANY;
    choice = chosen || (areMany ? "notable" : "all");
    drawLegend(parts, critical);
    filters.hidden = parts.length === 0;
    levelsBox.hidden = !areMany || levels.size === 0;
    if (!levelsBox.hidden) drawLevels(parts, levels);
    if (areMany && options.isOver) drawShape(parts, scale);
    else shape.replaceChildren();

    drawChips(parts, critical);
    const found = CHOICES[choice][1](parts, critical).filter((part) => !needle || part.name.toLowerCase().includes(needle));
    const size = areMany ? PAGE : MANY;
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.max(0, Math.min(page, pages - 1));
    chart.draw(found.slice(page * size, (page + 1) * size), options);
    chart.element.hidden = found.length === 0;
    nothing.hidden = found.length > 0 || parts.length === 0;
    pager.hidden = pages < 2;
    if (!pager.hidden) {
      pager.firstChild.disabled = page === 0;
      pager.lastChild.disabled = page === pages - 1;
      setText(pager.children[1], `${count(page * size + 1)} to ${count(Math.min(found.length, (page + 1) * size))} of ${count(found.length)}`);
    }
  }

  function drawLegend(parts, critical) {
    const states = tally(parts);
    const items = [
      ...SUBSYSTEM_STATES.filter((state) => states[state]).map((state) => [state, `${count(states[state])} ${lower(state)}`]),
      ...(critical.size ? [["CRITICAL", `${count(critical.size)} on the critical path`]] : []),
    ];
    keyed(counts, items, ([id]) => id,
      ([id]) => h("span", { class: "state", "data-state": id }, id === "CRITICAL" ? h("span", { class: "critical-mark" }) : sign(id), h("span")),
      (item, [, text]) => setText(item.lastChild, text));
  }

  function drawChips(parts, critical) {
    const items = Object.entries(CHOICES)
      .filter(([id]) => id !== "running" || parts.some((part) => part.state === "SUBSYSTEM_STATE_RUNNING") || choice === id)
      .filter(([id]) => id !== (parts.length > MANY ? "slowest" : "notable") || choice === id)
      .filter(([id]) => id !== "critical" || critical.size || choice === id);
    keyed(chips, items, ([id]) => id,
      ([id, [text]]) => h("button", { type: "button", class: "chip", onclick: () => {
        chosen = id;
        page = 0;
        redraw();
      } }, text),
      (chip, [id]) => setAttribute(chip, "aria-pressed", String(id === choice)));
  }

  function drawLevels(parts, levels) {
    const byLevel = new Map();
    for (const part of parts) {
      const level = levels.get(part.name) ?? -1;
      if (!byLevel.has(level)) byLevel.set(level, []);
      byLevel.get(level).push(part);
    }
    const rows = [...byLevel].sort((a, b) => a[0] - b[0]);
    // Many levels make as long a list as many subsystems.
    keyed(levelsTable.tBodies[0], rows.slice(0, PAGE), ([level]) => level,
      ([level]) => h("tr", {}, h("th", { scope: "row", class: "number" }, level < 0 ? "not in the plan" : count(level)),
        h("td", { class: "number" }), h("td"), h("td", { class: "number" }), h("td", { class: "number" }), h("td", { class: "number" })),
      (line, [level, group]) => {
        const [, total, stands, failed, from, to] = line.children;
        const states = tally(group);
        setText(total, count(group.length));
        const words = JSON.stringify(states);
        if (stands.dataset.states !== words) {
          stands.dataset.states = words;
          replace(stands, stacked(states, SUBSYSTEM_STATES, `Level ${level}`));
        }
        setText(failed, count(group.filter(hasFailed).length));
        const starts = group.map((part) => part.start).filter((at) => at !== undefined);
        const ends = group.map((part) => part.end).filter((at) => at !== undefined);
        setText(from, starts.length ? duration(least(starts)) : "–");
        setText(to, ends.length === group.length ? duration(-least(ends.map((at) => -at))) : "–");
      });
    setText(levelsBox.firstChild, `By level of the plan: ${counted(rows.length, "level")}${rows.length > PAGE ? `, of which the first ${PAGE}` : ""}`);
  }

  let shapeOf = null;

  function drawShape(parts, scale) {
    if (shapeOf === parts && shape.firstChild) return;
    shapeOf = parts;
    replace(shape, profile(concurrency(parts), scale));
  }

  return { element, draw };
}

/** @param {number[]} numbers */
function least(numbers) {
  return numbers.reduce((a, b) => Math.min(a, b), Infinity);
}
