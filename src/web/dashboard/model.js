// The known state of the service, kept up to date by its events.

import { getStatus, listCycles, whoAmI } from "./api.js";
import { throttled } from "./dom.js";
import { instant, lower, milliseconds, word } from "./format.js";
import { cycleStateOf, hasFailed, standing, stateOf, tally } from "./states.js";

/** With more subsystems, views show summaries instead of each subsystem, and large data is read less often. */
export const MANY = 300;

/** Number of recent cycles whose results are kept for every subsystem. */
export const RECENT = 30;

/** With more subsystems, `recent` is not kept: records are megabytes then. */
export const RECENT_SUBSYSTEMS = 1000;

/**
 * A recently recorded cycle: its summary, and the state of each of its parts.
 * @typedef {ReturnType<typeof summary> & { parts: Map<string, string> }} Recent
 */

/**
 * @type {{
 *   connection: "connecting" | "open" | "lost", status: any, who: any, running: Map<string, Live>, last: Live | null,
 *   recent: Recent[]
 * }}
 */
export const model = {
  /** "connecting", "open" or "lost". */
  connection: "connecting",
  /** `OrchestratorStatus`, or null before the first one. */
  status: null,
  /** This browser, as the service knows it: `WhoAmIResponse`, or null before the first answer. */
  who: null,
  /** The running cycles, by id. See `Live`. */
  running: new Map(),
  /** The last cycle that was recorded while this page was open, as a `Live`, or null. */
  last: null,
  /** Summaries of the latest cycles, oldest first, each with `parts` if its record can be read. */
  recent: [],
};

const listeners = new Map();

/**
 * Calls `listener` with each kind of change, until the returned function is called: "connection"; "status"; "who";
 * "live" (a running cycle has made progress, or another one has started or ended); "recorded" (with the telemetry);
 * "unreadable" (with the summary of a recorded cycle whose record can't be read); "reloaded" (events may have been
 * missed: read again).
 */
export function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, new Set());
  listeners.get(event).add(listener);
  return () => listeners.get(event).delete(listener);
}

function tell(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

// ------------------------------------------------------------------------------------------- the clock

let skew = 0;

/** The service's wall clock, in milliseconds since 1970, so that ages are right even if the local clock is wrong. */
export function now() {
  return Date.now() + skew;
}

// ----------------------------------------------------------------------------------------- the status

/** The number of registered subsystems, if known. */
export function fleetSize() {
  return model.status?.subsystemCount ?? 0;
}

/**
 * The highest known id of a cycle: ids have no gap, and each cycle is recorded, runs, or waits.
 */
export function newestId() {
  const { totalCycles = 0, runningCycles = [], queuedCycles = 0 } = model.status ?? {};
  return Number(totalCycles) + runningCycles.length + queuedCycles;
}

/** The newest revision of an event. */
let revision = 0;

async function readStatus(options) {
  try {
    const status = await getStatus(options);
    // An answer can be older than an event that arrived meanwhile.
    if (Number(status.newestRevision ?? 0) < revision) return;
    skew = instant(status.startedAt) + milliseconds(status.uptime) - Date.now() || 0;
    model.status = options?.omitLastCycle ? { ...status, lastCycle: model.status?.lastCycle } : status;
    tell("status");
  } catch {
    // The stream of events reports a lost connection.
  }
}

async function readWho() {
  try {
    model.who = await whoAmI();
    tell("who");
  } catch {
    // As above.
  }
}

// The stream delivers the last cycle, which is megabytes for a large fleet.
const refreshStatus = throttled(500, () => readStatus({ omitLastCycle: true }));

// -------------------------------------------------------------------------------- the running cycles

/** A running cycle: the state of each of its parts, by name and in the order of the plan. */
class Live {
  constructor(started) {
    this.cycleId = started.cycleId;
    this.startedAt = instant(started.startedAt);
    this.trigger = started.trigger;
    this.loop = started.loop;
    this.parts = new Map((started.subsystems ?? []).map((name) => [name, waiting(name)]));
    /** Number of lost updates. */
    this.dropped = 0;
    /** Its record, once it has ended. */
    this.record = null;
  }

  progress({ updates = [], dropped = 0 }) {
    this.dropped += Number(dropped);
    for (const update of updates) {
      const part = this.parts.get(update.name) ?? waiting(update.name);
      const elapsed = update.elapsedMs ?? 0;
      part.state = update.state;
      part.attempts = update.attempts ?? 0;
      part.errorCode = update.errorCode;
      part.errorMessage = update.errorMessage;
      if (stateOf(update) === "RUNNING") part.start ??= elapsed;
      else part.end = elapsed;
      this.parts.set(update.name, part);
    }
  }

  /** Its parts, in order; those of the record once it is recorded. */
  list() {
    return [...this.parts.values()];
  }

  /** Number of its parts that have ended. */
  ended() {
    return this.record ? this.parts.size : this.list().filter((part) => part.end !== undefined).length;
  }

  /** What started it, in words. */
  startedBy() {
    return startedBy(this);
  }

  end(record) {
    this.record = record;
    this.parts = new Map(partsOf(record).map((part) => [part.name, part]));
  }

  /** Milliseconds since its start; its duration once it has ended. */
  elapsed() {
    return this.record ? (this.record.durationMs ?? 0) : Math.max(0, now() - this.startedAt);
  }
}

/** What starts a cycle, in words. */
export function startedBy({ loop, trigger }) {
  return loop ? `loop ${loop}` : lower(word(trigger, "TRIGGER_")) || "unknown trigger";
}

/** The running cycles, the oldest first. */
export function runningCycles() {
  return [...model.running.values()].sort((a, b) => a.cycleId - b.cycleId);
}

/** A running cycle, or the last one, as a `Live`; undefined if it is neither. */
export function liveCycle(id) {
  return model.running.get(id) ?? (model.last?.cycleId === id ? model.last : undefined);
}

function begin(started) {
  const live = new Live(started);
  // A subsystem is in one cycle at a time: another cycle with it has ended, even if its record was not received.
  const names = [...live.parts.keys()];
  for (const [id, other] of model.running) {
    if (names.some((name) => other.parts.has(name))) model.running.delete(id);
  }
  model.running.set(live.cycleId, live);
}

/** Its record replaces the observed progress. */
function end(record) {
  const live = model.running.get(record.cycleId);
  model.running.delete(record.cycleId);
  live?.end(record);
  model.last = live ?? liveOf(record);
}

function waiting(name) {
  return { name, state: "SUBSYSTEM_STATE_WAITING", attempts: 0 };
}

/** The parts of a record, each with `start` and `end`, in milliseconds since the cycle's start. */
export function partsOf(record) {
  const origin = instant(record.startedAt);
  return (record.subsystems ?? []).map((part) => {
    const start = instant(part.startedAt) - origin;
    const isTimed = Number.isFinite(start);
    return { ...part, start: isTimed ? start : undefined, end: isTimed ? start + (part.durationMs ?? 0) : undefined };
  });
}

/** A record as an ended `Live`. */
export function liveOf(record) {
  const live = new Live({ ...record, subsystems: [] });
  live.end(record);
  return live;
}

// ------------------------------------------------------------------------------------- recent cycles

/** The summary of a cycle for lists and charts: the whole record can be large. */
export function summary(record) {
  const parts = record.subsystems ?? [];
  return {
    id: record.cycleId,
    revision: Number(record.revision),
    state: cycleStateOf(record),
    trigger: word(record.trigger, "TRIGGER_"),
    loop: record.loop ?? "",
    startedAt: record.startedAt,
    finishedAt: record.finishedAt,
    durationMs: record.durationMs ?? 0,
    error: record.error ?? "",
    total: parts.length,
    failed: parts.filter(hasFailed).length,
    counts: tally(parts),
  };
}

/** The summary of an `UnreadableCycle`. Its id may be unreadable, too. */
function summaryOfUnreadable({ cycleId = "", revision = "0", problem = "" }) {
  return {
    id: cycleId, revision: Number(revision), state: "UNREADABLE", trigger: "", loop: "", durationMs: NaN, error: problem, total: 0,
    failed: 0, counts: {},
  };
}

/** Summaries of all cycles of a page, newest first; `of` summarizes a record. */
export function summaries({ cycles, unreadable }, of = summary) {
  return [...cycles.map(of), ...unreadable.map(summaryOfUnreadable)].sort((a, b) => b.revision - a.revision);
}

function remembered(record) {
  return { ...summary(record), parts: new Map((record.subsystems ?? []).map((part) => [part.name, standing(part)])) };
}

function keep(cycle) {
  if (fleetSize() > RECENT_SUBSYSTEMS) return;
  // A cycle that was recorded meanwhile may be both in the page and in an event.
  if (cycle.revision <= (model.recent.at(-1)?.revision ?? 0)) return;
  model.recent.push(cycle);
  model.recent.splice(0, model.recent.length - RECENT);
}

async function readRecent() {
  model.recent = [];
  if (fleetSize() > RECENT_SUBSYSTEMS) return;
  const page = await listCycles({ pageSize: RECENT });
  const meanwhile = model.recent;
  model.recent = [];
  summaries(page, remembered).reverse().forEach(keep);
  meanwhile.forEach(keep);
}

// ----------------------------------------------------------------------------------------- the events

/** Pause before the next connection after a failure. */
const AGAIN = 1000;

/** @type {EventSource | null} */
let source = null;
let timer = 0;

function connect() {
  clearTimeout(timer);
  source?.close();
  // Always from now on, not from the last revision: after a long pause, one page of the history is read instead of all
  // missed events. It is read after the bookmark, and so contains everything before it.
  revision = 0;
  source = new EventSource("/api/events?progress=true");
  const mine = source;
  source.onerror = () => {
    // Not the connection was lost, but the request was refused: this tells why.
    if (mine.readyState === EventSource.CLOSED) readWho();
    lose();
  };
  listen("refused", () => {
    readWho();
    lose();
  });
  listen("bookmark", async () => {
    if (model.connection === "open") return;
    await Promise.all([readStatus(), readWho()]);
    await readRecent().catch(() => {});
    setConnection("open");
    tell("reloaded");
  });
  listen("started", ({ started }) => {
    begin(started);
    tell("live");
    refreshStatus();
  });
  listen("progress", ({ progress }) => {
    const live = model.running.get(progress.cycleId);
    if (!live) return;
    live.progress(progress);
    tell("live");
  });
  listen("recorded", ({ recorded }) => {
    revision = Number(recorded.revision);
    end(recorded);
    keep(remembered(recorded));
    if (model.status) tellsOf(model.status, recorded);
    tell("live");
    tell("recorded", recorded);
    tell("status");
    refreshStatus();
  });
  listen("unreadable", ({ unreadable }) => {
    const cycle = summaryOfUnreadable(unreadable);
    model.running.delete(cycle.id);
    keep(cycle);
    tell("live");
    tell("unreadable", cycle);
    refreshStatus();
  });
}

/** Updates the status with a record, since the status is only polled. */
function tellsOf(status, record) {
  status.lastCycle = record;
  status.runningCycles = status.runningCycles?.filter(({ cycleId }) => cycleId !== record.cycleId);
  // Each recorded cycle has the next revision.
  const since = Number(record.revision) - Number(status.newestRevision ?? 0);
  if (since <= 0) return;
  status.newestRevision = record.revision;
  status.totalCycles = String(Number(status.totalCycles ?? 0) + since);
}

function listen(name, handle) {
  const mine = source;
  mine?.addEventListener(name, (event) => {
    if (source === mine) handle(event.data && JSON.parse(event.data));
  });
}

function lose() {
  source?.close();
  clearTimeout(timer);
  timer = setTimeout(connect, AGAIN);
  // The running cycles are no longer known.
  model.running.clear();
  setConnection("lost");
  tell("live");
}

function setConnection(state) {
  if (model.connection === state) return;
  model.connection = state;
  tell("connection");
}

/** Starts reading. A hidden page closes its connection: a browser has six for all pages of a site. */
export function start() {
  connect();
  setInterval(() => {
    if (model.connection === "open" && !document.hidden) refreshStatus();
  }, 5000);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      source?.close();
      model.connection = "connecting";
    } else {
      tell("connection");
      connect();
    }
  });
}
