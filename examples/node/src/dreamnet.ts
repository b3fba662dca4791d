// Existing in-process modules as subsystems of the orchestrator, many behind one port, and the familiar calls.
//
// A module is an object with `run(context)` and perhaps `status()` or `getStatus()`. Nothing in it changes:
//
// * Modules of one process find each other in `context` as the same live objects. A module of another process is
//   represented by its latest output: plain data, frozen. So is CitadelCore always, as `citadelSnapshot`. `context`
//   contains only the declared inputs.
// * `run` may be asynchronous, and return anything or nothing. Its output is a copy as JSON, made when `run` ended;
//   values that JSON can't represent are left out, with an issue. The object itself is never sent.
// * `run` is called once in a cycle, and never concurrently: a repeated call gets the first answer.
// * An exception of `run` fails only that subsystem in that cycle. Its stack is on stderr.
// * Modules that are only read (`READ_ONLY`, and any without `run`) are never run: their output is their status.

import { isDeepStrictEqual } from "node:util";
import {
  Server,
  status,
  type sendUnaryData,
  type ServerUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";
import { SubsystemClient } from "./contract.js";
import type { CycleTelemetry__Output } from "./gen/dreamnet/orchestrator/v1/CycleTelemetry.js";
import type { GetStatusRequest__Output } from "./gen/dreamnet/subsystem/v1/GetStatusRequest.js";
import type { GetStatusResponse } from "./gen/dreamnet/subsystem/v1/GetStatusResponse.js";
import type { InitializeRequest__Output } from "./gen/dreamnet/subsystem/v1/InitializeRequest.js";
import type { InitializeResponse } from "./gen/dreamnet/subsystem/v1/InitializeResponse.js";
import type { Input__Output } from "./gen/dreamnet/subsystem/v1/Input.js";
import type { Issue } from "./gen/dreamnet/subsystem/v1/Issue.js";
import type { RunCycleRequest__Output } from "./gen/dreamnet/subsystem/v1/RunCycleRequest.js";
import type { RunCycleResponse } from "./gen/dreamnet/subsystem/v1/RunCycleResponse.js";
import type { SubsystemHandlers } from "./gen/dreamnet/subsystem/v1/Subsystem.js";
import { frozen, snapshot, type Json } from "./json.js";
import {
  checkLoop,
  checkOptions,
  misspelt,
  namesOf,
  orchestratorAddress,
  parametersOf,
  suggest,
  type ServeOptions,
} from "./options.js";
import { ask, duration, register, type Orchestrator } from "./orchestrator.js";
import { describe, describeWithPlace, describeWithStack } from "./thrown.js";
import { isOf, serverCredentials } from "./tls.js";
import { contextKey, ONLY_OUTPUT, READ_ONLY, TOPOLOGY, type Settings, type SubsystemName } from "./topology.js";

export type { Json, ServeOptions, Settings, SubsystemName };
export { READ_ONLY };

// -------------------------------------------------------------------------------------------- types

/** An existing module. `run` is given its declared inputs; a module that wants more takes the `cycle` as well. */
export interface Module {
  run?(context: any, cycle: Cycle): unknown;
  status?: unknown;
  getStatus?: unknown;
}

/**
 * An object to serve: a module, or a class or a factory (also an asynchronous one) that makes it, once. An object that
 * is only read can be of any kind.
 */
export type Servable = Module | (new () => Module) | (() => Module | Promise<Module>) | object;

/** The cycle that a module runs in. */
export interface Cycle {
  readonly cycleId: number;
  /** When the cycle was due: the same for all of its subsystems. */
  readonly scheduledAt: Date;
  /** The parameters of the registration and of the cycle. */
  readonly parameters: Readonly<Record<string, Json>>;
  /** Every input by the name of its maker, as data. */
  readonly inputs: ReadonlyMap<string, InputData>;
  /**
   * Aborted when the call that started this run is cancelled or late. A module that then ends with an AbortError is run
   * again when the call is repeated.
   */
  readonly signal: AbortSignal;
  /** Reports a number to follow over time. */
  metric(name: string, value: number): void;
  /** Reports a problem or information without failing. */
  issue(severity: "INFO" | "WARNING" | "ERROR", code: string, message: string): void;
}

/** The latest output of another subsystem; `output` is missing if it has none. */
export interface InputData {
  readonly output?: Readonly<Record<string, Json>>;
  readonly fresh: boolean;
}

/** Modules that are being served. */
export interface Served {
  /** The address: "127.0.0.1:50051". */
  readonly address: string;
  /** The live objects, by name. */
  readonly objects: ReadonlyMap<string, Module>;
  /** Unregisters them, lets running calls end (for at most 10 s), and closes the port. */
  stop(): Promise<void>;
}

/** DreamNet's 28 modules by name, each of which may be missing. */
export type OrchestratorContext = { [name in SubsystemName]?: any };

/** The record of a cycle; times are epoch milliseconds. */
export interface CycleTelemetry {
  cycleId: number;
  startedAt: number;
  finishedAt: number;
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

// -------------------------------------------------------------------------------------------- serving

/** An error with a gRPC status code. */
class Refusal extends Error {
  constructor(readonly code: status, message: string) {
    super(message);
  }
}

// A retry comes within its cycle, and a subsystem is in one cycle at a time: a few answers are enough.
const REMEMBERED = 4;

/** One module under its name: implements the rules of the contract that need state. */
class Subsystem {
  private epoch = 0;
  /** By cycle; without an answer if a run ended because its call was cancelled. */
  private readonly answers = new Map<number, Promise<RunCycleResponse | undefined>>();
  private atWork: number | undefined;

  constructor(
    private readonly name: string,
    private readonly object: Module,
    private readonly readOnly: boolean,
    /** Inputs of an `after` that only sets the sequence. */
    private readonly unoffered: ReadonlySet<string>,
    private readonly objects: ReadonlyMap<string, Module>,
    private readonly itself: ReadonlySet<unknown>,
  ) {}

  checkEpoch(epoch: number): void {
    if (epoch < this.epoch) {
      const over = `epoch ${epoch} is over, epoch ${this.epoch} has called`;
      throw new Refusal(status.ABORTED, `${over}; restart ${this.name} if that one is gone`);
    }
    // Another orchestrator may count its cycles from 1 again.
    if (epoch > this.epoch) this.answers.clear();
    this.epoch = epoch;
  }

  async runCycle(request: RunCycleRequest__Output, signal: AbortSignal): Promise<RunCycleResponse> {
    this.checkEpoch(request.epoch);
    const { cycleId } = request;
    const first = this.answers.get(cycleId);
    if (first) return (await first) ?? this.runCycle(request, signal);
    if (this.atWork !== undefined) {
      throw new Refusal(status.UNAVAILABLE, `${this.name} is still at work in cycle ${this.atWork}`);
    }
    this.atWork = cycleId;
    const answer = this.run(request, signal)
      .catch((error) => {
        const gaveUp = signal.aborted && (error === signal.reason || (error as Error | undefined)?.name === "AbortError");
        if (!gaveUp) throw this.failure(`failed in cycle ${cycleId}`, error);
        this.answers.delete(cycleId);
        return undefined;
      })
      .finally(() => (this.atWork = undefined));
    this.answers.set(cycleId, answer);
    if (this.answers.size > REMEMBERED) this.answers.delete(this.answers.keys().next().value!);
    const done = await answer;
    if (!done) throw new Refusal(status.CANCELLED, `${this.name} ended early: the call was cancelled`);
    return done;
  }

  // Up to the first `await` this is synchronous, as is the copy of the result of a synchronous `run`.
  private async run(request: RunCycleRequest__Output, signal: AbortSignal): Promise<RunCycleResponse> {
    const metrics: Record<string, number> = {};
    const issues: Issue[] = [];
    const cycle: Cycle = {
      cycleId: request.cycleId,
      scheduledAt: new Date(toMs(request.scheduledAt)),
      parameters: frozen(request.parameters),
      inputs: new Map(Object.entries(request.inputs).map(([name, input]) => [name, toInputData(input)])),
      signal,
      metric(name, value) {
        if (typeof value !== "number") throw new TypeError(`the metric ${name} is a ${typeof value}: give a number`);
        metrics[name] = value;
      },
      issue(severity, code, message) {
        if (!SEVERITIES.includes(severity)) throw new TypeError(`${severity} is not one of ${SEVERITIES.join(", ")}`);
        issues.push({ severity: `SEVERITY_${severity}`, code: String(code), message: String(message) });
      },
    };
    let result: unknown;
    if (this.readOnly) {
      // It succeeds, so that it does not count as failed, and its output is its status, for modules of other processes.
      // If it were suspended instead, an operator could resume it, and those modules would get nothing.
      cycle.issue("INFO", "READ_ONLY", `${this.name} is only read: cycles do not run it`);
      try {
        result = await this.statusOf();
      } catch (error) {
        this.log(`has no status in cycle ${request.cycleId}`, error);
        cycle.issue("WARNING", "NO_STATUS", describeWithPlace(error));
      }
    } else {
      result = this.object.run!(this.contextOf(cycle), cycle);
      if (isThenable(result)) result = await result;
    }
    const { struct, dropped } = snapshot(result, this.itself);
    if (dropped.length > 0) cycle.issue("WARNING", "NOT_JSON", `left out of the output, or changed: ${dropped.join("; ")}`);
    return { output: struct, metrics, issues };
  }

  private contextOf(cycle: Cycle): Record<string, unknown> {
    const context: Record<string, unknown> = {};
    for (const [name, { output }] of cycle.inputs) {
      if (this.unoffered.has(name)) continue;
      const value = (ONLY_OUTPUT.has(name) ? undefined : this.objects.get(name)) ?? output;
      if (value !== undefined) context[contextKey(name)] = value;
    }
    return context;
  }

  private statusOf(): unknown {
    const { status, getStatus } = this.object;
    if (typeof status === "function") return status.call(this.object);
    if (typeof getStatus === "function") return getStatus.call(this.object);
    return undefined;
  }

  async getStatus(): Promise<GetStatusResponse> {
    if (typeof this.object.status !== "function" && typeof this.object.getStatus !== "function") {
      throw new Refusal(status.UNIMPLEMENTED, `${this.name} has neither status() nor getStatus()`);
    }
    try {
      return { status: snapshot(await this.statusOf(), this.itself).struct };
    } catch (error) {
      throw this.failure("has no status", error);
    }
  }

  /** An exception of the module: logged with its stack, returned to the caller with its place. */
  private failure(what: string, error: unknown): Refusal {
    this.log(what, error);
    return new Refusal(status.INTERNAL, describeWithPlace(error));
  }

  private log(what: string, error: unknown): void {
    console.error(`${this.name} ${what}: ${describeWithStack(error)}`);
  }
}

const SEVERITIES: readonly string[] = ["INFO", "WARNING", "ERROR"];

function toInputData({ freshness, output }: Input__Output): InputData {
  const fresh = freshness === "FRESHNESS_FRESH";
  // An empty output may be left out on the wire.
  return { fresh, ...((fresh || freshness === "FRESHNESS_STALE") && { output: frozen(output) }) };
}

function isThenable(value: unknown): value is PromiseLike<unknown> {
  try {
    return typeof (value as { then?: unknown } | null | undefined)?.then === "function";
  } catch {
    // Unreadable values are left out of the output, and reported.
    return false;
  }
}

/**
 * Serves `objects`, by name, at one port, and registers them if `options.orchestrator` is given.
 *
 * Objects without `run` are only read, as are those in `READ_ONLY` and `options.readOnly`.
 *
 * Throws if an option is unknown or its value is invalid, a name looks misspelt, the port is in use, a class or factory
 * makes no object, or the orchestrator can't be reached or refuses a registration. Then none stays registered.
 */
export async function serveSubsystems(
  objects: Readonly<Record<string, Servable | undefined>>,
  options: ServeOptions = {},
): Promise<Served> {
  checkOptions(options);
  const given = namesOf(objects);
  checkNames(given, options);
  const live = new Map<string, Module>();
  for (const name of inOrder(given, options)) {
    const object = await instantiate(objects[name]!);
    if (object === null || (typeof object !== "object" && typeof object !== "function")) {
      throw new TypeError(`${name} is not an object, nor a class or factory that makes one`);
    }
    live.set(name, object);
  }
  const readOnly = new Set<string>([...READ_ONLY, ...(options.readOnly ?? [])]);
  for (const name of options.run ?? []) readOnly.delete(name);
  // An object is never sent, even by another module that refers to it.
  const itself = new Set<unknown>([...live.values(), ...Object.values(objects).filter((object) => object != null)]);

  const subsystems = new Map<string, Subsystem>();
  const registrations: Array<Settings & { name: string }> = [];
  let previous: { name: string; phase: number } | undefined;
  for (const [name, object] of live) {
    const isRun = typeof object.run === "function" && !readOnly.has(name);
    const settings = settingsOf(name, options);
    const { phase = 0, requires = [], after = [], reads = [] } = settings;
    const inputs = new Set([...requires, ...after, ...reads]);
    const waitsFor = [...after];
    const unoffered = new Set<string>();
    // Modules that are not run change nothing, so their order does not matter.
    if (isRun && previous?.phase === phase && options.sequential !== false && options.orchestrator) {
      if (!requires.includes(previous.name) && !after.includes(previous.name)) waitsFor.push(previous.name);
      if (!inputs.has(previous.name)) unoffered.add(previous.name);
    }
    if (isRun) previous = { name, phase };
    registrations.push({ ...settings, name, after: waitsFor, reads: reads.filter((n) => !waitsFor.includes(n)) });
    subsystems.set(name, new Subsystem(name, object, !isRun, unoffered, live, itself));
  }

  const health = new HealthImplementation({ "": "SERVING", [HEALTH_SERVICE]: "SERVING" });
  // Inputs are outputs of others, 1 MiB each by default; this is the orchestrator's own limit for a message.
  const server = new Server({ "grpc.max_receive_message_length": 64 * 1024 * 1024 });
  const { credentials } = options;
  const caller = credentials === undefined ? undefined : (options.caller ?? "spiffe://fleet/core");
  server.addService(SubsystemClient.service, handlers(subsystems, caller));
  health.addToServer(server);
  const listen = options.listen ?? "127.0.0.1:0";
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync(listen, serverCredentials(credentials), (error, port) =>
      error ? reject(new Error(`can't listen on ${listen}: ${error.message}`, { cause: error })) : resolve(port),
    ),
  );
  const address = `${listen.slice(0, listen.lastIndexOf(":"))}:${port}`;

  const endpoint = options.endpoint ?? `${credentials === undefined ? "http" : "https"}://${address}`;

  let leave = async () => {};
  const stop = async () => {
    for (const service of ["", HEALTH_SERVICE]) health.setStatus(service, "NOT_SERVING");
    await leave();
    await new Promise<void>((resolve) => {
      // The server waits for peers to close their connections, even for dead ones.
      const grace = setTimeout(() => resolve(server.forceShutdown()), 10_000);
      server.tryShutdown(() => resolve(clearTimeout(grace)));
    });
  };
  if (options.orchestrator) {
    const all = registrations.map(({ parameters, ...registration }) => ({
      ...registration,
      endpoint,
      ...(parameters && { parameters: parametersOf(parameters, "parameters") }),
    }));
    try {
      leave = await register(all, orchestratorOf(options), options.leaseSeconds ?? 30);
    } catch (error) {
      server.forceShutdown();
      throw error;
    }
  }
  let stopped: Promise<void> | undefined;
  return { address, objects: live, stop: () => (stopped ??= stop()) };
}

const HEALTH_SERVICE = "dreamnet.subsystem.v1.Subsystem";

/** Refuses options with names that are not in `given`, and names that look like a misspelt name of DreamNet. */
function checkNames(given: readonly string[], options: ServeOptions): void {
  const { readOnly = [], run = [], registrations = {} } = options;
  for (const name of given) {
    const meant = misspelt(name);
    if (meant && !given.includes(meant) && !Object.hasOwn(registrations, name)) {
      const own = `For a module of your own, add it to registrations: { ${JSON.stringify(name)}: {} }`;
      throw new Error(`${name} is not a name of DreamNet: did you mean ${meant}? ${own}`);
    }
  }
  for (const [option, names] of Object.entries({ readOnly, run, registrations: Object.keys(registrations) })) {
    const unknown = names.find((name) => !given.includes(name));
    if (unknown === undefined) continue;
    const meant = suggest(unknown, given);
    throw new Error(`${option} names ${unknown}, which is not among the objects${meant ? `: ${meant}` : ""}`);
  }
  const both = run.find((name) => readOnly.includes(name));
  if (both !== undefined) throw new Error(`${both} is named in run and in readOnly`);
  for (const name of Object.keys(registrations)) {
    const { requires = [], after = [], reads = [] } = registrations[name] ?? {};
    for (const input of [...requires, ...after, ...reads]) {
      const meant = given.includes(input) ? undefined : misspelt(input);
      if (meant) throw new Error(`registrations.${name} names ${input}, which is not a name of DreamNet: did you mean ${meant}?`);
    }
  }
}

function settingsOf(name: string, options: ServeOptions): Settings {
  return { ...(TOPOLOGY as Record<string, Settings>)[name], ...options.registrations?.[name] };
}

/** By phase, then as in the table, then in the given order; but after all modules of its phase that it waits for. */
function inOrder(names: string[], options: ServeOptions): string[] {
  const table = Object.keys(TOPOLOGY);
  const row = (name: string) => (table.includes(name) ? table.indexOf(name) : table.length);
  const phase = (name: string) => settingsOf(name, options).phase ?? 0;
  const sorted = names.sort((a, b) => phase(a) - phase(b) || row(a) - row(b));
  const [met, order] = [new Set<string>(), [] as string[]];
  const place = (name: string): void => {
    if (met.has(name)) return;
    met.add(name);
    const { requires = [], after = [] } = settingsOf(name, options);
    const first = [...requires, ...after];
    sorted.filter((other) => first.includes(other) && phase(other) === phase(name)).forEach(place);
    order.push(name);
  };
  sorted.forEach(place);
  return order;
}

async function instantiate(servable: Servable): Promise<Module> {
  if (typeof servable !== "function" || typeof (servable as Module).run === "function") return servable as Module;
  const isClass =
    /^class\b/.test(Function.prototype.toString.call(servable)) || typeof servable.prototype?.run === "function";
  return isClass ? new (servable as new () => Module)() : await (servable as () => Module | Promise<Module>)();
}

/** With a `caller`, only the client with this URI in its certificate may call: the others are subsystems themselves. */
function handlers(subsystems: ReadonlyMap<string, Subsystem>, caller?: string): SubsystemHandlers {
  const of = ({ subsystem: name }: { subsystem: string }) => {
    const subsystem = subsystems.get(name);
    if (!subsystem) throw new Refusal(status.NOT_FOUND, `subsystem ${name} is not served here`);
    return subsystem;
  };
  const checkCaller = (call: ServerUnaryCall<unknown, unknown>) => {
    if (caller === undefined || isOf(call.getAuthContext().sslPeerCertificate, caller)) return;
    throw new Refusal(status.PERMISSION_DENIED, `only ${caller} may call`);
  };
  /** An exception in a call becomes the answer of that call. */
  const unary =
    <Q, A>(work: (request: Q, signal: AbortSignal) => A | Promise<A>) =>
    (call: ServerUnaryCall<Q, A>, callback: sendUnaryData<A>): void => {
      const gone = new AbortController();
      call.on("cancelled", () => gone.abort());
      new Promise<A>((resolve) => {
        checkCaller(call);
        resolve(work(call.request, gone.signal));
      }).then(
        (answer) => callback(null, answer),
        (error) => {
          if (error instanceof Refusal) return callback({ code: error.code, details: error.message });
          console.error(`a call failed: ${describeWithStack(error)}`);
          callback({ code: status.INTERNAL, details: describeWithPlace(error) });
        },
      );
    };
  return {
    Initialize: unary<InitializeRequest__Output, InitializeResponse>((request) => {
      of(request).checkEpoch(request.epoch);
      return {};
    }),
    RunCycle: unary<RunCycleRequest__Output, RunCycleResponse>((request, signal) =>
      of(request).runCycle(request, signal),
    ),
    GetStatus: unary<GetStatusRequest__Output, GetStatusResponse>((request) => of(request).getStatus()),
  };
}

// -------------------------------------------------------------------------------------------- the familiar calls

/** Options of the familiar calls. The orchestrator is by default at `ORCHESTRATOR_ADDRESS`, else at 127.0.0.1:7700. */
export type CallOptions = ServeOptions;

function orchestratorOf({ orchestrator, credentials, waitSeconds }: CallOptions): Orchestrator {
  const elsewhere = process.env.ORCHESTRATOR_ADDRESS || "127.0.0.1:7700";
  const address = orchestrator
    ? orchestratorAddress(orchestrator, "orchestrator", credentials)
    : orchestratorAddress(elsewhere, "ORCHESTRATOR_ADDRESS", credentials);
  return { address, credentials, waitSeconds: waitSeconds ?? 30 };
}

const serving = new Map<OrchestratorContext, { options: ServeOptions; served: Promise<Served> }>();

/** Serves and registers the modules in `context`; only once, however often it is called. */
async function serve(context: OrchestratorContext, options: CallOptions): Promise<void> {
  const known = serving.get(context);
  const all = { ...options, orchestrator: orchestratorOf(options).address };
  if (known) {
    const differs = (Object.keys(all) as Array<keyof CallOptions>).find(
      (option) =>
        option !== "waitSeconds" && all[option] !== undefined && !isDeepStrictEqual(all[option], known.options[option]),
    );
    if (differs) throw new Error(`the modules in context are served with another ${differs}: first await stopServing(context)`);
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
  const { telemetry } = await ask<{ telemetry: CycleTelemetry__Output | null }>(
    orchestratorOf(options),
    (client, options, callback) => client.runCycle({}, options, callback),
    // No limit besides the deadline of the cycle.
    Infinity,
  );
  return toTelemetry(telemetry!);
}

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
  options: CallOptions & { /** Default "dreamnet". */ loop?: string } = {},
): IntervalLoop {
  checkLoop(intervalMs, options);
  const { loop: name = "dreamnet", ...rest } = options;
  const orchestrator = orchestratorOf(rest);
  const interval = duration(intervalMs);
  const key = `${orchestrator.address} ${name}`;
  const earlier = loops.get(key);
  const started = (async () => {
    await earlier?.settled;
    await serve(context, rest);
    await ask(orchestrator, (client, options, callback) =>
      client.startIntervalLoop({ loop: { name, interval } }, options, callback),
    );
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

  const stop = () => (stopping ??= stopOnce().catch((error) => {
    stopping = undefined;
    throw error;
  }));
  async function stopOnce(): Promise<void> {
    clearInterval(timer);
    await started;
    // This handle must not stop a loop that was started again under the same name.
    if (loops.get(key) === own) {
      const stopped = ask(orchestrator, (client, options, callback) => client.stopIntervalLoop({ name }, options, callback));
      own.settled = stopped.then(() => {}, () => {});
      await stopped.catch((error: ServiceError) => {
        // NOT_FOUND: the loop was already stopped.
        if (error.code !== status.NOT_FOUND) throw error;
      });
    }
    clearInterval(watch);
  }
  return Object.assign(timer, { started, stop });
}

/** The last cycle of the orchestrator, and the number of all cycles. */
export async function getStatus(options: CallOptions = {}): Promise<OrchestratorStatus> {
  checkOptions(options);
  const answer = await ask<{ status: { lastCycle: CycleTelemetry__Output | null; totalCycles: number } | null }>(
    orchestratorOf(options),
    (client, options, callback) => client.getStatus({}, options, callback),
  );
  const { lastCycle, totalCycles } = answer.status!;
  return { totalCycles, ...(lastCycle && { lastCycle: toTelemetry(lastCycle) }) };
}

function toTelemetry(cycle: CycleTelemetry__Output): CycleTelemetry {
  const { cycleId, durationMs, error } = cycle;
  const finishedAt = toMs(cycle.finishedAt);
  // A cycle that never started has no start time.
  const startedAt = cycle.startedAt ? toMs(cycle.startedAt) : finishedAt;
  return { cycleId, startedAt, finishedAt, durationMs, ...(error && { error }) };
}

const toMs = (time: { seconds: number; nanos: number } | null) => (time ? time.seconds * 1000 + time.nanos / 1e6 : 0);
