// The calls that DreamNet is used to.

import { isDeepStrictEqual } from "node:util";
import { status } from "@grpc/grpc-js";
import { describe, Orchestrator, type AnswerOf, type OrchestratorError } from "dreamnet-subsystem";
import { checkLoop, checkOptions, type CallOptions, type LoopOptions, type ServeOptions } from "./options.js";
import { serveSubsystems, type Served } from "./serve.js";
import type { SubsystemName } from "./topology.js";

/** DreamNet's 28 modules by name, each of which may be missing. */
export type OrchestratorContext = { [name in SubsystemName]?: any };

/** The record of a cycle; times are whole milliseconds since 1970. */
export interface CycleTelemetry {
  cycleId: number;
  startedAt: number;
  finishedAt: number;
  /** `finishedAt - startedAt`. */
  durationMs: number;
  /** A summary of the failures in one line. Not set if nothing failed. */
  error?: string;
}

/** The state of the orchestrator. */
export interface OrchestratorStatus {
  lastCycle?: CycleTelemetry;
  totalCycles: number;
}

/**
 * A loop that runs in the orchestrator until it is stopped: it outlives this process. The handle is a timer, so that
 * `clearInterval(loop)` stops it as before, within half a second.
 */
export type IntervalLoop = NodeJS.Timeout & {
  /** Settles when the modules are registered and the loop runs, or rejects with the reason. */
  readonly started: Promise<void>;
  /** Stops the loop at once. The modules stay served. */
  stop(): Promise<void>;
};

/** The orchestrators that this process calls, by their options: each has one connection. */
const orchestrators = new Map<string, Orchestrator>();

function orchestratorOf({ orchestrator, credentials, wait }: CallOptions): Orchestrator {
  const given = {
    orchestrator: orchestrator ?? undefined,
    credentials: credentials ?? undefined,
    wait: wait ?? undefined,
  };
  const key = JSON.stringify([given, process.env.ORCHESTRATOR_ADDRESS, process.env.ORCHESTRATOR_CREDENTIALS]);
  const known = orchestrators.get(key) ?? new Orchestrator(given);
  orchestrators.set(key, known);
  return known;
}

const serving = new Map<OrchestratorContext, { options: ServeOptions; served: Promise<Served> }>();

/** Serves and registers the modules in `context`; only once, however often it is called. */
async function serve(context: OrchestratorContext, options: CallOptions): Promise<void> {
  const known = serving.get(context);
  const all = { ...options, orchestrator: orchestratorOf(options).address.url };
  if (known) {
    const differs = (Object.keys(all) as Array<keyof CallOptions>).find(
      (option) =>
        option !== "wait" && all[option] !== undefined && !isDeepStrictEqual(all[option], known.options[option]),
    );
    if (differs)
      throw new Error(`the modules in context are served with another ${differs}: first await stopServing(context)`);
    await known.served;
    return;
  }
  const served = serveSubsystems(context, all);
  serving.set(context, { options: all, served });
  served.catch(() => serving.delete(context));
  await served;
}

/** Stops serving the modules in `context`. Until then the process stays alive. */
export async function stopServing(context: OrchestratorContext): Promise<void> {
  const known = serving.get(context);
  serving.delete(context);
  await (await known?.served)?.stop();
}

/** Serves and registers the modules in `context` on the first call with it, and runs one cycle. */
export async function runSingleCycle(context: OrchestratorContext, options: CallOptions = {}): Promise<CycleTelemetry> {
  checkOptions(options);
  await serve(context, options);
  // No limit besides the deadline of the cycle.
  const { telemetry } = await orchestratorOf(options).call("RunCycle", {}, Number.POSITIVE_INFINITY);
  return toTelemetry(telemetry!);
}

/** The last cycle of the orchestrator, and the number of all cycles. */
export async function getStatus(options: CallOptions = {}): Promise<OrchestratorStatus> {
  checkOptions(options);
  return toStatus(await orchestratorOf(options).call("GetStatus", {}));
}

// -------------------------------------------------------------------------------------------- loops

// How often the handle of a loop shows that it has not been cleared.
const BEAT_MS = 100;

/** The loops that this process has started, by orchestrator and name, with the completion of their last request. */
const loops = new Map<string, { settled: Promise<void> }>();

/**
 * Serves and registers the modules in `context`, and lets the orchestrator run a cycle every `intervalMs`. A loop of
 * the same name is replaced.
 */
export function startIntervalLoop(
  context: OrchestratorContext,
  intervalMs = 5000,
  options: LoopOptions = {},
): IntervalLoop {
  checkLoop(intervalMs, options);
  const { loop: name = "dreamnet", ...rest } = options;
  const orchestrator = orchestratorOf(rest);
  const seconds = Math.floor(intervalMs / 1000);
  const interval = { seconds, nanos: Math.min(Math.round((intervalMs - seconds * 1000) * 1e6), 999_999_999) };
  const key = `${orchestrator.address.url} ${name}`;
  const earlier = loops.get(key);
  const started = (async () => {
    await earlier?.settled;
    await serve(context, rest);
    await orchestrator.call("StartIntervalLoop", { loop: { name, interval } });
  })();

  const own = { settled: started.catch(() => {}) };
  loops.set(key, own);

  let stopping: Promise<void> | undefined;
  // `clearInterval` calls nothing, but a cleared timer no longer fires, which can be detected.
  let beats = 0;
  const timer = setInterval(() => (beats += 1), BEAT_MS);
  const watch = setInterval(() => {
    if (beats === 0 && !stopping) {
      stop().catch((error) => console.error(`a loop was not stopped, retrying: ${describe(error)}`));
    }
    beats = 0;
  }, 4 * BEAT_MS);
  started.catch((error) => {
    [timer, watch].forEach(clearInterval);
    // Reported here as well, for callers that only keep the handle.
    console.error(`the loop ${name} was not started: ${describe(error)}`);
  });

  const stop = () =>
    (stopping ??= stopOnce().catch((error) => {
      stopping = undefined;
      throw error;
    }));
  async function stopOnce(): Promise<void> {
    clearInterval(timer);
    await started;
    // This handle must not stop a loop that was started again under the same name.
    if (loops.get(key) === own) {
      const stopped = orchestrator.call("StopIntervalLoop", { name });
      own.settled = stopped.then(
        () => {},
        () => {},
      );
      await stopped.catch((error: OrchestratorError) => {
        // NOT_FOUND: the loop was already stopped.
        if (error.code !== status.NOT_FOUND) throw error;
      });
    }
    clearInterval(watch);
  }
  return Object.assign(timer, { started, stop });
}

// -------------------------------------------------------------------------------------------- OrchestratorCore

// How old the status can be that is returned without asking.
const FRESH_MS = 500;

/**
 * The orchestrator as DreamNet has it: one object, whose `getStatus` returns at once. The options of the latest call
 * that had any are those of `getStatus`.
 */
export const OrchestratorCore = {
  /** As the function. When it resolves, `getStatus` knows the cycle. */
  async runSingleCycle(context: OrchestratorContext, options?: CallOptions): Promise<CycleTelemetry> {
    follow(options);
    const telemetry = await runSingleCycle(context, following.options);
    await refresh();
    return telemetry;
  },

  /** As the function. */
  startIntervalLoop(context: OrchestratorContext, intervalMs?: number, options?: LoopOptions): IntervalLoop {
    const { loop, ...rest } = options ?? {};
    follow(options && rest);
    return startIntervalLoop(context, intervalMs, { ...following.options, ...(loop !== undefined && { loop }) });
  },

  /**
   * The last known status, at most half a second old while the orchestrator answers. Without an orchestrator that has
   * answered, no cycle is known. It is asked in the background from the first call of this object on.
   */
  getStatus(options?: CallOptions): OrchestratorStatus {
    follow(options);
    return structuredClone(following.status);
  },

  /** As the function `stopServing`. */
  stopServing,
};

const following: {
  options: CallOptions;
  status: OrchestratorStatus;
  timer?: NodeJS.Timeout;
  asked: Promise<void>;
  isAsking: boolean;
} = {
  options: {},
  status: { totalCycles: 0 },
  asked: Promise.resolve(),
  isAsking: false,
};

/** Keeps the status fresh, with these options if there are any. Keeps no process alive. */
function follow(options: CallOptions | undefined): void {
  if (options) {
    checkOptions(options);
    const isOther = orchestratorOf(options).address.url !== orchestratorOf(following.options).address.url;
    following.options = options;
    if (isOther) following.status = { totalCycles: 0 };
  }
  if (following.timer) return;
  const ask = () => void (following.isAsking || refresh());
  following.timer = setInterval(ask, FRESH_MS).unref();
  ask();
}

/** Asks once more, after what is being asked. */
function refresh(): Promise<void> {
  following.asked = following.asked.then(async () => {
    const { options } = following;
    following.isAsking = true;
    try {
      const status = await getStatus({ ...options, wait: "0s" });
      if (options === following.options) following.status = status;
    } catch {
      // It stays the last known one. Calls that need the orchestrator report the reason.
    } finally {
      following.isAsking = false;
    }
  });
  return following.asked;
}

// -------------------------------------------------------------------------------------------- records

type Record_ = NonNullable<AnswerOf<"RunCycle">["telemetry"]>;

function toStatus({ status }: AnswerOf<"GetStatus">): OrchestratorStatus {
  const { lastCycle, totalCycles } = status!;
  return { totalCycles: Number(totalCycles), ...(lastCycle && { lastCycle: toTelemetry(lastCycle) }) };
}

function toTelemetry(cycle: Record_): CycleTelemetry {
  const finishedAt = toMs(cycle.finishedAt);
  // A cycle that never started has no start time.
  const startedAt = cycle.startedAt ? toMs(cycle.startedAt) : finishedAt;
  const { cycleId, error } = cycle;
  return {
    cycleId: Number(cycleId),
    startedAt,
    finishedAt,
    durationMs: finishedAt - startedAt,
    ...(error && { error }),
  };
}

type Timestamp = Record_["finishedAt"];

const toMs = (time: Timestamp) => (time ? Number(time.seconds) * 1000 + Math.round(time.nanos / 1e6) : 0);
