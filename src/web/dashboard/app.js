// The frame: which view is shown, the state of the connection, and the keys.

import { audits, Refusal } from "./api.js";
import { h, replace, setAttribute, setText } from "./dom.js";
import { counted, visible, word } from "./format.js";
import { model, on, start } from "./model.js";
import { href, parse } from "./route.js";
import * as audit from "./views/audit.js";
import * as cycle from "./views/cycle.js";
import * as cycles from "./views/cycles.js";
import * as fleet from "./views/fleet.js";
import * as live from "./views/live.js";
import * as loops from "./views/loops.js";
import * as part from "./views/part.js";
import * as plan from "./views/plan.js";
import * as subsystem from "./views/subsystem.js";

/** By path; the first is the default. */
const VIEWS = [
  { path: "fleet", view: fleet },
  { path: "live", view: live },
  { path: "cycles", view: cycles },
  { path: "cycles/:id", view: cycle, within: "cycles" },
  { path: "cycles/:id/:name", view: part, within: "cycles" },
  { path: "plan", view: plan },
  { path: "loops", view: loops },
  { path: "audit", view: audit },
  { path: "subsystems/:name", view: subsystem, within: "fleet" },
];

const main = element("main", HTMLElement);
const auditItem = element("audit", HTMLElement);
const help = element("help", HTMLDialogElement);
const theme = element("theme", HTMLButtonElement);
const keysOn = element("keys-on", HTMLInputElement);

/** @type {Scope | null} */
let scope = null;

/**
 * An element of index.html, checked for its class.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {{ new (): T }} kind
 */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${kind.name} called ${id}`);
  return found;
}

/** The first element of the current view that matches, if any. */
function find(selector) {
  return /** @type {HTMLElement | null} */ (main.querySelector(selector));
}

// ----------------------------------------------------------------------------------------- the views

/** Listeners and timers of a view, which end when another view is shown. */
class Scope {
  #ends = [];
  #aborter = new AbortController();

  /** Aborted at the end. */
  get signal() {
    return this.#aborter.signal;
  }

  /** Listens to the model until the end. */
  on(event, listener) {
    this.#ends.push(on(event, listener));
  }

  /** Calls `work` at this interval in milliseconds until the end, while the page is visible. */
  every(ms, work) {
    const timer = setInterval(() => document.hidden || work(), ms);
    this.#ends.push(() => clearInterval(timer));
  }

  /** Shows an error, unless the view has ended. */
  async attempt(work, place = main) {
    try {
      await work();
    } catch (error) {
      if (this.signal.aborted) return;
      // A lost connection is reported once, at the top of the page, and the content stays.
      if (error instanceof TypeError && model.connection !== "open") return;
      const message = error instanceof Error ? error.message : error;
      replace(place, h("p", { class: "problem", role: "alert" }, visible(message, 1000)));
      if (!(error instanceof Refusal)) console.error(error);
    }
  }

  end() {
    this.#aborter.abort();
    for (const end of this.#ends) end();
  }
}

function show(isFirst = false) {
  const route = parse(location.hash, VIEWS.map(({ path }) => path));
  const entry = VIEWS.find(({ path }) => path === route.pattern) ?? VIEWS[0];
  scope?.end();
  scope = new Scope();
  const heading = h("h1", { tabindex: -1 }, visible(entry.view.title(route)));
  replace(main, heading);
  if (route.unknown) main.append(h("p", { class: "problem", role: "alert" }, `There is no view "${visible(route.unknown, 60)}".`));
  document.title = `${entry.view.title(route)} · orchestrator`;
  for (const link of document.querySelectorAll("#views a")) {
    const isCurrent = link.getAttribute("href") === href(entry.within ?? entry.path);
    if (isCurrent) link.setAttribute("aria-current", entry.within ? "true" : "page");
    else link.removeAttribute("aria-current");
  }
  entry.view.mount(main, route, scope);
  if (!isFirst) {
    heading.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
}

// ------------------------------------------------------------------------------------ the connection

function showConnection() {
  const words = {
    connecting: "Connecting",
    open: "Live",
    lost: "Connection lost, reconnecting",
  };
  const state = element("connection", HTMLElement);
  state.dataset.connection = model.connection;
  setText(state.lastElementChild ?? state, words[model.connection]);
  document.body.classList.toggle("lost", model.connection === "lost");
}

function showStatus() {
  const { status } = model;
  if (!status) return;
  // The default id adds nothing to the name beside it.
  const id = status.orchestratorId === "orchestrator" ? "" : status.orchestratorId;
  setText(element("orchestrator-id", HTMLElement), visible(id, 100));
  element("insecure", HTMLElement).hidden = !status.insecure;
  element("paused", HTMLElement).hidden = !status.loopsPaused;
  element("read-only", HTMLElement).hidden = !status.readOnly;
  showMissing(status);
  const unable = element("unable-to-lead", HTMLElement);
  unable.hidden = !status.unableToLead;
  if (status.unableToLead) {
    const replica = visible(status.replica?.name ?? "", 100);
    setText(unable, `The replica ${replica} can't lead, and only follows until it can: ${visible(status.unableToLead, 1000)}`);
  }
  const problem = element("store-error", HTMLElement);
  problem.hidden = !status.storeError;
  if (status.storeError) {
    setText(problem, `The store can't be written, and no cycle starts until it can: ${visible(status.storeError, 1000)}`);
  }
}

/** The expected subsystems that are not registered. */
function showMissing({ missingCount = 0, missing = [] }) {
  const banner = element("missing", HTMLElement);
  banner.hidden = missingCount === 0;
  const named = missing.slice(0, 10).map((name) => visible(name, 100));
  const more = missingCount > named.length ? ` and ${missingCount - named.length} more` : "";
  setText(banner, `Expected, but not registered: ${named.join(", ")}${more}`);
}

/** Whether rights are enforced, by `AccessMode`. */
const ACCESS = {
  OFF: "Every caller may do everything (access.mode = off)",
  DRY_RUN: "Every caller may do everything; calls that access.mode = enforce would refuse are logged and counted",
  ENFORCE: "Callers may do what their grants allow (access.mode = enforce)",
};

function showWho() {
  if (!model.who) return;
  const { identity, mode } = model.who;
  const name = word(mode, "ACCESS_MODE_");
  const access = element("access", HTMLElement);
  const who = name === "OFF" || !identity ? "" : ` · ${visible(identity, 100)}`;
  setText(access, `access: ${name.toLowerCase()}${who}`);
  setAttribute(access, "title", ACCESS[name] ?? null);
  auditItem.hidden = !audits(model.who);
  // Others have no session: they show a certificate, or nothing.
  element("logout", HTMLElement).hidden = !/^(token|jwt):/.test(identity ?? "");
}

// Announcements for screen readers: changes of the state of cycles, not every cycle.
let told = "";

function announce(record) {
  const state = record.state.replace("CYCLE_STATE_", "").toLowerCase();
  if (state === told) return;
  const isFirst = told === "";
  told = state;
  if (isFirst) return;
  const failed = record.error ? `: ${visible(record.error, 200)}` : "";
  setText(element("announcer", HTMLElement), `Cycle ${record.cycleId} ${state}${failed}`);
}

// ------------------------------------------------------------------------------------------- the keys

const THEMES = ["auto", "light", "dark"];

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  setText(theme, `Theme: ${name}`);
  store("theme", name);
}

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(stored("theme") ?? "auto") + 1) % THEMES.length]);
}

// Storage may be disabled; then settings last as long as the page.
const choices = new Map();

function stored(name) {
  try {
    return localStorage.getItem(name) ?? choices.get(name);
  } catch {
    return choices.get(name);
  }
}

function store(name, value) {
  choices.set(name, value);
  try {
    localStorage.setItem(name, value);
  } catch {
    // See above.
  }
}

const KEYS = {
  1: () => (location.hash = href("fleet")),
  2: () => (location.hash = href("live")),
  3: () => (location.hash = href("cycles")),
  4: () => (location.hash = href("plan")),
  5: () => (location.hash = href("loops")),
  6: () => {
    if (!auditItem.hidden) location.hash = href("audit");
  },
  "/": () => find("input[type=search]")?.focus(),
  "[": () => find("[rel=prev]:not([hidden])")?.click(),
  "]": () => find("[rel=next]:not([hidden])")?.click(),
  h: () => find("#hold")?.click(),
  t: nextTheme,
  "?": () => help.showModal(),
};

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = KEYS[event.key];
  // Users of speech input may need single keys for something else.
  if (!action || (stored("keys") === "off" && event.key !== "?")) return;
  event.preventDefault();
  action();
}

// ------------------------------------------------------------------------------------------ the start

setTheme(stored("theme") ?? "auto");
theme.addEventListener("click", nextTheme);
element("help-open", HTMLButtonElement).addEventListener("click", () => help.showModal());
keysOn.checked = stored("keys") !== "off";
keysOn.addEventListener("change", () => store("keys", keysOn.checked ? "on" : "off"));
element("skip", HTMLAnchorElement).addEventListener("click", (event) => {
  // Its target is not a view.
  event.preventDefault();
  find("h1")?.focus();
});
document.addEventListener("keydown", press);
window.addEventListener("hashchange", () => show());
on("connection", showConnection);
on("status", showStatus);
on("who", showWho);
on("recorded", announce);
on("unreadable", ({ id }) => setText(element("announcer", HTMLElement), `The record of cycle ${id || "?"} can't be read`));
on("connection", () => {
  const words = { open: "Connected", lost: "Connection lost, reconnecting" }[model.connection];
  if (words) setText(element("announcer", HTMLElement), `${words}${model.connection === "open" && model.status ? `, ${counted(model.status.totalCycles, "cycle")} recorded` : ""}`);
});
show(true);
showConnection();
start();
