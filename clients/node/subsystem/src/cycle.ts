// What a subsystem's function gets.

import { setTimeout } from "node:timers/promises";
import { shortened, Stopped } from "./errors.js";
import type { JsonObject } from "./objects.js";

// Bytes. The contract sets these.
const MAX_METRIC_NAME = 128;
const MAX_ISSUE_CODE = 128;
const MAX_ISSUE_MESSAGE = 4096;

/** FRESH if an input was made in this cycle, STALE if in another one, ABSENT if no output exists. */
export type Freshness = "FRESH" | "STALE" | "ABSENT";

/**
 * INFO if nothing is wrong, WARNING if a part of the work was left out or done worse than intended, ERROR if a part of
 * the work failed, though the call as a whole did not.
 */
export type Severity = "INFO" | "WARNING" | "ERROR";

const SEVERITIES: readonly string[] = ["INFO", "WARNING", "ERROR"];

/** The latest output of another subsystem. */
export interface Input {
  /** Empty if the input is ABSENT. */
  readonly output: JsonObject;
  readonly freshness: Freshness;
  /** The cycle that made it. 0 if the input is ABSENT. */
  readonly cycleId: number;
}

/** The inputs by the name of their maker: one for each name in `requires`, `after` and `reads`. */
export class Inputs extends Map<string, Input> {
  /** @throws RangeError if the registration does not name this input */
  override get(name: string): Input {
    const input = super.get(name);
    if (input) return input;
    const has = [...this.keys()].sort().join(", ") || "none";
    throw new RangeError(`${name} is not an input: name it in requires, after or reads (inputs: ${has})`);
  }
}

/** A problem or information that does not fail the call. */
export interface Issue {
  readonly code: string;
  readonly message: string;
  readonly severity: Severity;
}

/** The fields of a `Cycle`, each of which may be missing. */
export interface CycleFields {
  subsystem?: string;
  cycleId?: number;
  epoch?: number;
  attempt?: number;
  scheduledAt?: Date | undefined;
  parameters?: JsonObject;
  inputs?: Readonly<Record<string, Partial<Input>>>;
  traceHeaders?: Readonly<Record<string, string>>;
  deadline?: number;
  signal?: AbortSignal;
}

/** The part of one subsystem in one cycle. For a unit test of a function, give only the fields that it uses. */
export class Cycle {
  /** The name of the called subsystem. */
  readonly subsystem: string;
  /** Strictly increasing, with gaps. */
  readonly cycleId: number;
  /** The term of the calling orchestrator. */
  readonly epoch: number;
  /** The number of this call in its cycle. Log it; it must not change the work. */
  readonly attempt: number;
  /** When the cycle was due: "now" for work that must be repeatable. */
  readonly scheduledAt: Date | undefined;
  /** Those of the registration, overridden key by key by those of the cycle. */
  readonly parameters: JsonObject;
  readonly inputs: Inputs;
  /**
   * `traceparent` and `tracestate` (W3C Trace Context), if the cycle is traced: for OpenTelemetry's `extract`, and for
   * requests that the work makes.
   */
  readonly traceHeaders: Readonly<Record<string, string>>;
  /** When the call ends, in milliseconds as of `Date.now()`. Infinity if it has no deadline. */
  readonly deadline: number;
  /**
   * Aborted, with the reason, when the answer can't be used any more: the deadline has passed, the callers have gone,
   * or a later cycle or epoch has begun. Pass it to whatever the work waits for.
   */
  readonly signal: AbortSignal;
  /** Those reported so far, see `metric`. */
  readonly metrics: Record<string, number> = {};
  /** Those reported so far, see `issue`. */
  readonly issues: Issue[] = [];

  constructor(fields: CycleFields = {}) {
    this.subsystem = fields.subsystem ?? "";
    this.cycleId = fields.cycleId ?? 0;
    this.epoch = fields.epoch ?? 0;
    this.attempt = fields.attempt ?? 1;
    this.scheduledAt = fields.scheduledAt;
    this.parameters = fields.parameters ?? {};
    this.inputs = new Inputs();
    for (const [name, { output = {}, freshness = "FRESH", cycleId = 0 }] of Object.entries(fields.inputs ?? {})) {
      this.inputs.set(name, { output, freshness, cycleId });
    }
    this.traceHeaders = fields.traceHeaders ?? {};
    this.deadline = fields.deadline ?? Number.POSITIVE_INFINITY;
    this.signal = fields.signal ?? new AbortController().signal;
  }

  /** The span of the call, as W3C Trace Context writes it. Undefined if the cycle is not traced. */
  get traceparent(): string | undefined {
    return this.traceHeaders.traceparent;
  }

  /**
   * Reports a number to follow over time. By default, the orchestrator accepts 64 of them.
   *
   * @throws TypeError if the name is not 1 to 128 bytes, or the value is not a finite number
   */
  metric(name: string, value: number): void {
    const bytes = Buffer.byteLength(name);
    if (bytes < 1 || bytes > MAX_METRIC_NAME) {
      throw new TypeError(`the name of the metric "${name.slice(0, 40)}" is not 1 to ${MAX_METRIC_NAME} bytes`);
    }
    if (!Number.isFinite(value)) throw new TypeError(`the metric ${name} is ${value}: give a finite number`);
    this.metrics[name] = value;
  }

  /**
   * Reports a problem or information without failing. By default, the orchestrator accepts 32 of them.
   *
   * `code` is a short constant for grouping by programs. A message of more than 4 KiB is shortened.
   *
   * @throws TypeError if the code is more than 128 bytes, or the severity does not exist
   */
  issue(code: string, message: string, severity: Severity = "WARNING"): void {
    if (Buffer.byteLength(code) > MAX_ISSUE_CODE) {
      throw new TypeError(`the code of the issue "${code.slice(0, 40)}" is more than ${MAX_ISSUE_CODE} bytes`);
    }
    if (!SEVERITIES.includes(severity)) throw new TypeError(`${severity} is not one of ${SEVERITIES.join(", ")}`);
    this.issues.push({ code, message: shortened(String(message), MAX_ISSUE_MESSAGE), severity });
  }

  /** Milliseconds until the deadline: 0 after it, Infinity without one. */
  remaining(): number {
    return Math.max(0, this.deadline - Date.now());
  }

  /** True if the answer can't be used any more, see `signal`. */
  get stopped(): boolean {
    return this.signal.aborted || this.remaining() === 0;
  }

  /** Throws `Stopped` if the answer can't be used any more. For between the steps of long work. */
  check(): void {
    this.signal.throwIfAborted();
    if (this.stopped) throw new Stopped("its deadline has passed");
  }

  /** Waits for this many milliseconds. Rejects as soon as the answer can't be used any more. */
  async sleep(ms: number): Promise<void> {
    await setTimeout(ms, undefined, { signal: this.signal });
  }
}
