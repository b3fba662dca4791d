// Existing in-process modules as subsystems of the orchestrator, many behind one port.
//
// A module is an object with `run(context)` and perhaps `status()` or `getStatus()`. Nothing in it changes:
//
// * Modules of one process find each other in `context` as the same live objects. A module of another process is
//   represented by an object with the same methods, which are called there. CitadelCore is always represented by its
//   latest output, as `citadelSnapshot`: plain data, frozen. `context` contains only the declared inputs.
// * `run` may be asynchronous, and return anything or nothing. Its output is a copy as JSON, made when `run` ended;
//   values that JSON can't represent are left out, with an issue. The object itself is never sent.
// * `run` is called once in a cycle, and never concurrently: a repeated call gets the first answer.
// * An exception of `run` fails only that subsystem in that cycle. Its stack is on stderr.
// * Modules that are only read (`READ_ONLY`, and any without `run`) are never run: their output is their status.
//
// The modules work in this thread; another thread serves them, renews their leases and makes calls to other processes.

import { Worker } from "node:worker_threads";
import { status } from "@grpc/grpc-js";
import {
  describeWithPlace,
  Fleet,
  FleetError,
  OptionError,
  Orchestrator,
  Stopped,
  type CycleFields,
  type JsonObject,
  type Problem,
  type RegistrationOptions,
} from "dreamnet-subsystem";
import { Link } from "./link.js";
import type { Declared, Failed, Result, Start, ToModules, ToNetwork } from "./messages.js";
import { checkNames, checkOptions, fleetOptions, namesOf, toMs, type ServeOptions } from "./options.js";
import { isAbort, Runner, type Module } from "./runner.js";
import { NOT_RUN, READ_ONLY, TOPOLOGY } from "./topology.js";

/**
 * An object to serve: a module, or a class or a factory (also an asynchronous one) that makes it, once. An object that
 * is only read can be of any kind.
 */
export type Servable = Module | (new () => Module) | (() => Module | Promise<Module>) | object;

/** Modules that are being served. */
export interface Served {
  /** The address: "127.0.0.1:50051". */
  readonly address: string;
  /** The live objects, by name. */
  readonly objects: ReadonlyMap<string, Module>;
  /** Unregisters them, lets running cycles and calls end (within `grace`), and closes the port. */
  stop(): Promise<void>;
}

/**
 * Serves `objects`, by name, at one port, and registers them with the orchestrator, if there is one.
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
  return await new Serving(live, objects, options).started();
}

/** Modules of this thread, and the thread of the network that serves them. */
class Serving {
  private readonly runners = new Map<string, Runner>();
  private readonly declared: Declared[] = [];
  private readonly link: Link;
  private readonly aborts = new Map<number, AbortController>();

  constructor(
    private readonly live: ReadonlyMap<string, Module>,
    objects: Readonly<Record<string, Servable | undefined>>,
    private readonly options: ServeOptions,
  ) {
    // An object is never sent, even by another module that refers to it.
    const itself = new Set<unknown>([...live.values(), ...Object.values(objects).filter((object) => object != null)]);
    const isRun = (name: string) => isRunBy(name, live.get(name)!, options);
    const fleet = new Fleet(fleetOptions(options));
    this.link = new Link(live, toMs(options.callTimeout ?? "5s"));
    try {
      for (const [name, object] of live) {
        const { registration, inputs } = placed(name, [...live.keys()].filter(isRun), isRun(name), options);
        const runner = new Runner(name, object, isRun(name), inputs, live, this.link, itself);
        // Refuses invalid options before anything is served.
        fleet.subsystem(name, registration, () => {});
        this.runners.set(name, runner);
        this.declared.push({ name, registration, hasStatus: runner.hasStatus, calls: runner.calls });
      }
      if (live.size === 0) throw new OptionError("there is no module to serve");
    } catch (error) {
      this.link.close();
      throw error;
    }
  }

  /** Starts the thread of the network. Resolves when the modules are registered, if there is an orchestrator. */
  async started(): Promise<Served> {
    const { link, options } = this;
    const start: Start = {
      fleet: fleetOptions(options),
      modules: this.declared,
      peers: options.peers ?? [],
      callTimeoutMs: toMs(options.callTimeout ?? "5s"),
      calls: link.port,
      signal: link.signal,
    };
    // Options of the process, such as loaders and `--input-type`, are for its own program.
    const worker = new Worker(new URL("./worker.js", import.meta.url), {
      execArgv: [],
      transferList: [link.port],
      workerData: start,
    });
    const tell = (message: ToNetwork) => worker.postMessage(message);
    const exited = new Promise<void>((resolve) => worker.once("exit", () => resolve()));
    let stopped: Promise<void> | undefined;
    const stop = (): Promise<void> =>
      (stopped ??= (async () => {
        tell({ kind: "stop" });
        await exited;
      })());

    const orchestrator = (options.orchestrator ?? process.env.ORCHESTRATOR_ADDRESS) || undefined;
    const waitMs = toMs(options.wait ?? "30s");
    let address = "";
    let isSettled = false;
    let problem: Problem | undefined;
    let limit: NodeJS.Timeout | undefined; // Only of an orchestrator that is down: this process may be slow itself.
    let refuse!: (error: Error) => void;
    const refused = new Promise<never>((_, reject) => (refuse = reject));
    const notRegistered = (what: string) => refuse(new Error(`the orchestrator at ${urlOf(options)} ${what}`));
    const late = () =>
      notRegistered(`can't be reached${waitMs > 0 ? ` within ${waitMs / 1000} s` : ""}: ${problem!.message}`);
    let register!: () => void;
    const registered = new Promise<void>((resolve) => (register = resolve));
    worker.on("message", (message: ToModules) => {
      switch (message.kind) {
        case "listening":
          address = message.endpoint.replace(/^https?:\/\//, "");
          if (!orchestrator) register();
          break;
        case "registered":
          register();
          break;
        case "problem": {
          if (isSettled) break; // Its line in the log is enough.
          problem = message.problem;
          const isDown = problem.code === status.UNAVAILABLE || problem.code === status.DEADLINE_EXCEEDED;
          if (!isDown) notRegistered(`answered ${problem.message}`);
          else limit ??= setTimeout(late, waitMs);
          break;
        }
        case "ended":
          refuse(asError(message.error));
          break;
        default:
          this.take(message, tell);
      }
    });
    worker.once("error", (error) => {
      console.error(`the modules are no longer served: ${describeWithPlace(error)}`);
      refuse(error);
    });
    worker.once("exit", () => link.close());
    try {
      await Promise.race([registered, refused]);
    } catch (error) {
      await stop();
      throw error;
    } finally {
      isSettled = true;
      clearTimeout(limit);
      refused.catch(() => {}); // It ends later, too.
    }
    return { address, objects: this.live, stop };
  }

  /** Does what the thread of the network asks for. */
  private take(message: ToModules, tell: (message: ToNetwork) => void): void {
    switch (message.kind) {
      case "log":
        // One line for each module would be too many: the operator sees them in the registry.
        if (!/ is (un)?registered\b|^serving |^not registered: /.test(message.line)) console.error(message.line);
        break;
      case "run":
        void this.run(message.id, message.name, message.cycle, message.described, tell);
        break;
      case "abort":
        this.aborts.get(message.id)?.abort(new Stopped(message.reason));
        break;
      case "status":
        void this.status(message.id, message.name, tell);
    }
  }

  private async run(
    id: number,
    name: string,
    fields: CycleFields,
    described: Parameters<Runner["run"]>[1],
    tell: (message: ToNetwork) => void,
  ): Promise<void> {
    const runner = this.runners.get(name)!;
    const abort = new AbortController();
    this.aborts.set(id, abort);
    let result: Result | Failed;
    try {
      result = await runner.run({ ...fields, signal: abort.signal }, described);
    } catch (error) {
      result = { failed: describeWithPlace(error), stopped: isAbort(error, abort.signal) };
    }
    this.aborts.delete(id);
    tell({ kind: "done", id, result });
  }

  private async status(id: number, name: string, tell: (message: ToNetwork) => void): Promise<void> {
    const runner = this.runners.get(name)!;
    let result: JsonObject | Failed;
    try {
      result = await runner.status();
    } catch (error) {
      runner.log("has no status", error);
      result = { failed: describeWithPlace(error), stopped: false };
    }
    tell({ kind: "done", id, result });
  }
}

function asError(error: { name: string; message: string } | undefined): Error {
  if (!error) return new Error("the modules are no longer served");
  const { name, message } = error;
  return new ({ OptionError, FleetError }[name] ?? Error)(message);
}

function urlOf({ orchestrator, credentials }: ServeOptions): string {
  return new Orchestrator({ orchestrator: orchestrator || undefined, credentials }).address.url;
}

// -------------------------------------------------------------------------------------------- order

function isRunBy(name: string, object: Module, { readOnly, run }: ServeOptions): boolean {
  const isRead = readOnly?.includes(name) || ((READ_ONLY as readonly string[]).includes(name) && !run?.includes(name));
  return typeof object.run === "function" && !isRead;
}

function settingsOf(name: string, { registrations }: ServeOptions): RegistrationOptions {
  return { ...(TOPOLOGY as Readonly<Record<string, RegistrationOptions>>)[name], ...registrations?.[name] };
}

/** The registration of a module in the sequence of `run`, those of this process that are run; and its own inputs. */
function placed(name: string, run: readonly string[], isRun: boolean, options: ServeOptions) {
  const settings = settingsOf(name, options);
  const { phase = 0, requires = [], after = [], reads = [] } = settings;
  const inputs = new Set([...requires, ...after, ...reads]);
  if (!isRun || options.sequential === false) return { registration: settings, inputs };
  // The one before it in this process, and all of the table before it that may be in others, of which some may be
  // missing. Modules that are not run change nothing, so their order does not matter.
  const ofPhase = run.filter((other) => (settingsOf(other, options).phase ?? 0) === phase);
  const previous = ofPhase[ofPhase.indexOf(name) - 1];
  const table = Object.entries(TOPOLOGY).map(([other, place]) => ({ other, phase: place.phase }));
  const row = table.findIndex(({ other }) => other === name);
  const elsewhere = table
    .slice(0, Math.max(0, row))
    .filter((it) => it.phase === phase && !NOT_RUN.has(it.other) && !run.includes(it.other) && it.other !== name)
    .map(({ other }) => other);
  const waitsFor = new Set([...after, ...elsewhere, ...(previous ? [previous] : [])]);
  for (const other of requires) waitsFor.delete(other);
  const registration = { ...settings, after: [...waitsFor], reads: reads.filter((other) => !waitsFor.has(other)) };
  return { registration, inputs };
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
