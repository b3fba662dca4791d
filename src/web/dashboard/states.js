// The states of cycles and subsystems: their words, their signs, and which ones count as failures.

import { h, s } from "./dom.js";
import { lower, word } from "./format.js";

/** The states of subsystems' parts, the worst first; see `standing`. */
export const SUBSYSTEM_STATES = [
  "FAILED", "TIMED_OUT", "CIRCUIT_OPEN", "SKIPPED_FOR_A_FAILURE", "SKIPPED", "CANCELLED", "RUNNING", "WAITING", "SUCCEEDED",
];

/** The states of cycles, the worst first. "UNREADABLE" marks a cycle whose record can't be read. */
export const CYCLE_STATES = ["FAILED", "DEGRADED", "INTERRUPTED", "CANCELLED", "SUCCEEDED"];

/** Reasons of skipped parts that count as failures. */
const FAILING_SKIPS = new Set(["REQUIREMENT_FAILED", "REQUIREMENT_MISSING", "CYCLE_DEADLINE", "NOT_REGISTERED", "OWNER_REVOKED"]);

const SKIP_REASONS = {
  SUSPENDED: "it is suspended",
  REQUIREMENT_FAILED: "one that it requires did not succeed",
  REQUIREMENT_MISSING: "one that it requires is not registered",
  REQUIREMENT_LEFT_OUT: "one that it requires is suspended or not in this cycle",
  CYCLE_DEADLINE: "the cycle's deadline had passed before its turn",
  NOT_REGISTERED: "it is expected, but not registered",
  OWNER_REVOKED: "its owner is revoked",
};

/** "SUCCEEDED" of a `SubsystemTelemetry` or a `SubsystemProgress`. */
export function stateOf(part) {
  return word(part?.state, "SUBSYSTEM_STATE_");
}

/** "DEGRADED" of a `CycleTelemetry`. */
export function cycleStateOf(cycle) {
  return word(cycle?.state, "CYCLE_STATE_");
}

/** True if a part counts as a failure of its cycle. */
export function hasFailed(part) {
  const state = stateOf(part);
  if (state === "SKIPPED") return FAILING_SKIPS.has(word(part.skipReason, "SKIP_REASON_"));
  return state === "FAILED" || state === "TIMED_OUT" || state === "CIRCUIT_OPEN";
}

/** The state of a part, which distinguishes skipped parts that count as failures from those that don't. */
export function standing(part) {
  const state = stateOf(part) || "NONE";
  return state === "SKIPPED" && hasFailed(part) ? "SKIPPED_FOR_A_FAILURE" : state;
}

/** Why a part did not succeed, in one line; empty if it succeeded. */
export function reasonOf(part) {
  const { errorCode, errorMessage } = part ?? {};
  if (errorCode && errorMessage) return `${errorCode}: ${errorMessage}`;
  if (errorMessage) return errorMessage;
  // The message, which names the required subsystem, is left out of records that would be too large.
  const skip = word(part?.skipReason, "SKIP_REASON_");
  return skip ? SKIP_REASONS[skip] ?? lower(skip) : errorCode || "";
}

/** Why a record of a cycle in this state has no parts. */
export function withoutParts(state) {
  return state === "INTERRUPTED" ? "its parts are not known" : "no subsystem was called";
}

/** Number of these parts by state. */
export function tally(parts) {
  const counts = {};
  for (const part of parts) {
    const state = standing(part);
    counts[state] = (counts[state] ?? 0) + 1;
  }
  return counts;
}

// One sign for each state, in addition to its colour: a 12 × 12 path, drawn as a line.
const SIGNS = {
  SUCCEEDED: "M2.5 6.5 5 9l4.5-6",
  FAILED: "M3 3l6 6M9 3 3 9",
  DEGRADED: "M6 1.8 10.6 10H1.4ZM6 5v2M6 8.4v.4",
  TIMED_OUT: "M6 1.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9M6 3.5V6l1.8 1.2",
  SKIPPED: "M2.5 3l4 3-4 3M9 3v6",
  SKIPPED_FOR_A_FAILURE: "M2.5 3l4 3-4 3M9 3v6",
  CIRCUIT_OPEN: "M1 7h3M8 7h3M4 7l3.5-4",
  CANCELLED: "M6 1.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9M2.9 9.1l6.2-6.2",
  UNREADABLE: "M4 4.2a2 2 0 1 1 2.8 1.8C6.2 6.4 6 6.8 6 7.6M6 9.6v.4",
  INTERRUPTED: "M7 1 3 6.5h3L5 11l4-5.5H6Z",
  RUNNING: "M4 2.5v7L9.5 6Z",
  WAITING: "M3 6h.2M6 6h.2M9 6h.2",
  NONE: "M3 6h6",
  SUSPENDED: "M4 3v6M8 3v6",
  STALE: "M6 1.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9M6 3.5V6l1.8 1.2",
  FRESH: "M2.5 6.5 5 9l4.5-6",
  ABSENT: "M3 6h6",
};

/**
 * The sign alone; the caller adds the word.
 * @param {string} state
 */
export function sign(state) {
  return s(
    "svg",
    { class: "sign", viewBox: "0 0 12 12", "aria-hidden": "true", "data-state": state },
    s("path", { d: SIGNS[state] ?? SIGNS.NONE }),
  );
}

/**
 * A state's sign and word.
 * @param {string} state
 * @param {string} text
 */
export function badge(state, text = lower(state || "none")) {
  return h("span", { class: "state", "data-state": state || "NONE" }, sign(state || "NONE"), h("span", {}, text));
}

/** Updates a badge, unless it is unchanged. */
export function setBadge(element, state, text = lower(state || "none")) {
  const name = state || "NONE";
  if (element.dataset.state === name && element.lastChild.textContent === text) return;
  element.dataset.state = name;
  element.replaceChildren(sign(name), h("span", {}, text));
}
