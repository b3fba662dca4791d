// The audit events: what was changed, read and denied, and who called.

import { listAuditEvents } from "../api.js";
import { h, keyed, labelled, replace, scrolling } from "../dom.js";
import { count, counted, lower, time, visible, word } from "../format.js";
import { model } from "../model.js";
import { href, setQuery } from "../route.js";
import { badge } from "../states.js";

const PAGE = 50;

/** A page can be short, or even empty: at most this number of pages is read before the user must continue. */
const REQUESTS = 12;

/** Which events are shown: the words, and the fields of the request. */
const CHOICES = {
  changes: ["changes", { kind: "AUDIT_KIND_CHANGE" }],
  denied: ["denied calls", { denied: true }],
};

/** The signs of the decisions. */
const SIGNS = { ALLOWED: "SUCCEEDED", WOULD_BE_DENIED: "DEGRADED", DENIED: "FAILED" };

export const title = () => "Audit";

export function mount(main, route, scope) {
  const filter = Object.fromEntries(["show", "caller"].map((name) => [name, route.query.get(name) ?? ""]));
  // Tokens of the pages up to this one; the first page has no token.
  let tokens = route.query.get("before") ? ["", route.query.get("before")] : [""];
  let next = "";
  let shown = [];
  let reading = 0;
  // False while the page is read, and after an error: a caller without the right does not ask again and again.
  let isRead = false;

  const note = h("p", { class: "summary", role: "status" }, "Reading the events …");
  const rows = h("tbody");
  const table = scrolling("Audit events", h("table", { class: "audit" }, h("caption", { class: "unseen" }, "Audit events, newest first"),
    h("thead", {}, h("tr", {}, ["Time", "Caller", "From", "RPC", "Targets"].map((text) => h("th", { scope: "col" }, text)),
      h("th", { scope: "col", class: "number" }, "Cycle"), ["Decision", "Code"].map((text) => h("th", { scope: "col" }, text)),
      h("th", { scope: "col", class: "number" }, "Calls"))),
    rows));
  table.hidden = true;
  const newer = h("button", { type: "button", rel: "prev", onclick: () => { tokens.pop(); turn(); } }, "Newer");
  const older = h("button", { type: "button", rel: "next", onclick: () => { tokens.push(next); turn(); } }, "Older");
  const pager = h("nav", { class: "pager", "aria-label": "Pages of events", hidden: true }, newer, h("span"), older);
  main.append(form(), note, table, pager);

  function form() {
    const field = (name, label, control) => labelled(label, control, (text) => {
      filter[name] = text;
      tokens = [""];
      turn();
    });
    const show = h("select", { id: "show" }, h("option", { value: "" }, "all"),
      Object.entries(CHOICES).map(([value, [text]]) => h("option", { value, selected: filter.show === value }, text)));
    const caller = h("input", { type: "search", id: "caller", value: filter.caller, placeholder: "Such as token:ops", autocomplete: "off", spellcheck: "false" });
    return h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); caller.dispatchEvent(new Event("change")); } },
      field("show", "Show", show),
      field("caller", "Caller", caller));
  }

  const request = (pageSize, pageToken) => listAuditEvents({ ...CHOICES[filter.show]?.[1], caller: filter.caller, pageSize, pageToken });

  function turn() {
    setQuery({ ...filter, before: tokens.at(-1) });
    read();
  }

  async function read() {
    reading += 1;
    const mine = reading;
    isRead = false;
    await scope.attempt(async () => {
      shown = [];
      next = tokens.at(-1);
      for (let i = 0; i < REQUESTS && shown.length < PAGE; i += 1) {
        const page = await request(PAGE - shown.length, next);
        if (scope.signal.aborted || mine !== reading) return;
        shown.push(...eventsOf(page));
        next = page.nextPageToken;
        draw();
        if (!next) break;
      }
      isRead = true;
    }, note);
  }

  /** Adds new events to the first page. */
  async function refresh() {
    if (!isRead || tokens.length > 1 || model.connection !== "open") return;
    const mine = reading;
    isRead = false;
    await scope.attempt(async () => {
      const page = await request(PAGE, "");
      if (scope.signal.aborted || mine !== reading) return;
      const fresh = eventsOf(page).filter(({ leaf }) => leaf > (shown[0]?.leaf ?? -1));
      isRead = true;
      if (fresh.length === 0) return;
      shown.unshift(...fresh);
      // The page grows at its top, and is read again if there are too many events, or some may be missing.
      if (fresh.length < PAGE && shown.length < 2 * PAGE) draw();
      else read();
    }, note);
  }

  function draw() {
    newer.disabled = tokens.length < 2;
    older.disabled = !next;
    pager.hidden = newer.disabled && older.disabled;
    const unreadable = shown.filter(({ problem }) => problem).length;
    replace(note, shown.length
      ? `${counted(shown.length, "event")}${tokens.length > 1 ? "" : ", newest first"}${next ? "; there are more" : ""}.${
        unreadable ? ` ${count(unreadable)} can't be read: the stored bytes were changed.` : ""}`
      : next ? "No match among the events examined so far; continue with Older."
      : Object.values(filter).some(Boolean) ? "No event matches the filter." : "No event is recorded.");
    table.hidden = shown.length === 0;
    keyed(rows, shown, ({ leaf }) => leaf, row);
  }

  scope.on("reloaded", read);
  scope.every(5000, refresh);
  if (model.connection === "open") read();
}

/** The events of a page, newest first, each with `leaf`, and with `problem` if it can't be read. */
function eventsOf({ events, unreadable }) {
  return [...events.map(({ leaf, event }) => ({ ...event, leaf: Number(leaf ?? 0) })), ...unreadable.map(({ leaf, problem }) => ({ leaf: Number(leaf ?? 0), problem }))]
    .sort((a, b) => b.leaf - a.leaf);
}

function row({ problem, ...event }) {
  if (problem) return h("tr", {}, h("td", { colspan: 9 }, visible(`The event of leaf ${event.leaf} can't be read: ${problem}`, 1000)));
  const decision = word(event.decision, "DECISION_");
  const leftOut = Number(event.targetsLeftOut ?? 0);
  const targets = [...(event.targets ?? []), ...(leftOut ? [`and ${counted(leftOut, "other")}`] : [])].join(", ");
  return h("tr", {},
    h("th", { scope: "row", class: "time" }, time(event.time)),
    h("td", {}, event.caller ? h("a", { href: href("audit", { caller: event.caller }), title: visible(event.caller) }, visible(event.caller)) : h("span", { class: "quiet" }, "the service")),
    h("td", {}, visible(event.peer) || "–", event.via && h("span", { class: "note" }, `via ${visible(event.via)}`)),
    h("td", {}, visible(event.rpc)),
    h("td", { class: "targets", title: visible(targets) || null }, visible(targets) || "–"),
    h("td", { class: "number" }, event.cycleId ? h("a", { href: href("cycles", event.cycleId) }, event.cycleId) : "–"),
    h("td", {}, badge(SIGNS[decision], lower(decision))),
    // A stream has no code before its end.
    h("td", {}, [visible(event.code) || "begun", event.reason && h("span", { class: "note" }, visible(event.reason))]),
    h("td", { class: "number" }, count(event.count)));
}
