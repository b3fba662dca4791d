// A fleet of subsystems in one process: where they are declared, served, registered, and stopped.

import { setTimeout } from "node:timers/promises";
import { Server, type ServiceDefinition, type UntypedServiceImplementation } from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";
import { handlers, Hosted, type Awaitable, type Output, type RunCycle, type Subsystem } from "./calls.js";
import { SUBSYSTEM, SUBSYSTEM_SERVICE } from "./contract.js";
import { Address, type Credentials } from "./credentials.js";
import { FleetError, OptionError } from "./errors.js";
import type { JsonObject } from "./objects.js";
import {
  flag,
  milliseconds,
  refuse,
  refuseUnknown,
  registration,
  REGISTRATION_OPTIONS,
  text,
  type DurationText,
  type RegistrationOptions,
} from "./options.js";
import { connectionOf } from "./orchestrator.js";
import { Registrar, type Problem } from "./registering.js";

const HOUR_MS = 3_600_000;
const LAST_ANSWERS_MS = 5000; // To send the answers of the last work. A dead peer never takes them.
const UNREGISTER_MS = 5000; // For the orchestrator to remove the registrations at the end.

// Requests of up to 64 MiB arrive; an orchestrator never sends larger ones.
const SERVER_OPTIONS = { "grpc.max_receive_message_length": 65 * 1024 * 1024, "grpc.max_send_message_length": -1 };

/** Options of a fleet. */
export interface FleetOptions {
  /**
   * Where to register: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`. Default: ORCHESTRATOR_ADDRESS. Without
   * it, or with "", the fleet only listens, and others register it.
   */
  orchestrator?: string | undefined;
  /**
   * A directory with cert.pem, key.pem and ca.pem, as `orchestrator certs issue` makes it, for TLS in both directions;
   * or a file with a token for the orchestrator. Default: ORCHESTRATOR_CREDENTIALS.
   */
  credentials?: string | undefined;
  /** `HOST:PORT` or `unix:/PATH`. Port 0 is a free one. Default "127.0.0.1:0". */
  listen?: string | undefined;
  /** Where the orchestrator dials it, if not where it listens. */
  endpoint?: string | undefined;
  /** With TLS, the URI in the certificate of the only caller that is accepted. Default "spiffe://fleet/core". */
  caller?: string | undefined;
  /**
   * The time until the orchestrator removes a dead process: 1 s to 24 h. Renewed three times as often. Default "15s".
   */
  lease?: DurationText | undefined;
  /** The time for running calls to end when the fleet stops: up to 1 h. Default "10s". */
  grace?: DurationText | undefined;
  /**
   * True to remove the registrations at the end, together with the latest outputs. False for a process that is
   * restarted: then cycles in between fail for it, until the lease ends. Default true.
   */
  unregister?: boolean | undefined;
  /** Takes each line of the log. Default: stderr. */
  log?: ((line: string) => void) | undefined;
}

/** The names of the options of a fleet. */
export const FLEET_OPTIONS = [
  "orchestrator",
  "credentials",
  "listen",
  "endpoint",
  "caller",
  "lease",
  "grace",
  "unregister",
  "log",
] as const satisfies ReadonlyArray<keyof FleetOptions>;

/** Options of a subsystem: those of its registration, and its other functions. */
export interface SubsystemOptions extends RegistrationOptions {
  /**
   * Called with the parameters before the first cycle of each orchestrator process and after a change of the
   * registration, and in this process before any cycle. It must not reset what cycles have built up.
   */
  initialize?: (parameters: JsonObject) => Awaitable<unknown>;
  /** Returns a snapshot of the state for people, an object. Called at any time, even while a cycle runs. */
  status?: () => Awaitable<Output>;
}

/** What a program wants to know of its fleet. */
export interface Hooks {
  /** Called once calls are answered, with the endpoint. */
  onListening?: (endpoint: string) => void;
  /** Called when all subsystems are registered, for the first time. */
  onRegistered?: () => void;
  /** Called for each problem that keeps them from being registered. It is tried again. */
  onProblem?: (problem: Problem) => void;
}

/** A fleet while it serves. */
interface Serving {
  readonly stopping: AbortController;
  readonly cutOff: AbortController;
}

/**
 * Subsystems that are served at one endpoint.
 *
 * Every option is checked when it is given: an unknown one, or a bad value, throws OptionError.
 */
export class Fleet {
  private readonly subsystems = new Map<string, Subsystem>();
  private readonly services: Array<[ServiceDefinition, UntypedServiceImplementation]> = [];
  private readonly orchestrator: Address | undefined;
  private readonly credentials: Credentials;
  private readonly listen: Address;
  private readonly endpoint: string | undefined;
  private readonly caller: string | undefined;
  private readonly leaseMs: number;
  private readonly graceMs: number;
  private readonly unregister: boolean;
  private readonly log: (line: string) => void;
  private serving: Serving | undefined;

  constructor(options: FleetOptions = {}) {
    refuseUnknown("Fleet", options, FLEET_OPTIONS);
    const { address, credentials } = connectionOf(options);
    this.orchestrator = address;
    this.credentials = credentials;
    const listen = options.listen ?? "127.0.0.1:0";
    if (typeof listen !== "string" || /^https?:/.test(listen)) {
      refuse("listen", listen, "HOST:PORT or unix:/PATH, without a scheme");
    }
    this.listen = Address.parse("listen", listen);
    this.endpoint = options.endpoint === undefined ? undefined : Address.parse("endpoint", options.endpoint).url;
    const caller = text('a URI, such as "spiffe://fleet/core"')("caller", options.caller ?? "spiffe://fleet/core");
    this.caller = credentials.hasCertificate ? caller : undefined;
    this.leaseMs = milliseconds(1000, 24 * HOUR_MS)("lease", options.lease ?? "15s");
    this.graceMs = milliseconds(0, HOUR_MS)("grace", options.grace ?? "10s");
    this.unregister = flag("unregister", options.unregister ?? true);
    this.log = options.log ?? ((line) => console.error(line));
    if (typeof this.log !== "function") refuse("log", options.log, "a function");
    if (credentials.hasCertificate && this.listen.isUnix) {
      refuse("listen", listen, "HOST:PORT: at a socket TLS is not used; or give no certificate");
    }
    if (this.orchestrator && !this.endpoint && ["0.0.0.0", "[::]"].includes(this.listen.host)) {
      throw new OptionError(`listen is '${listen}', which can't be dialed: give endpoint: "http://HOST:PORT" as well`);
    }
  }

  /**
   * Declares a subsystem of this name, whose part in a cycle is the function.
   *
   * The function gets a `Cycle`, and returns its output: an object that JSON can represent, or nothing for an empty
   * one. It may be asynchronous. An error fails the call; the others continue.
   */
  subsystem(name: string, runCycle: RunCycle): void;
  subsystem(name: string, options: SubsystemOptions, runCycle: RunCycle): void;
  subsystem(name: string, given: SubsystemOptions | RunCycle, function_?: RunCycle): void {
    const [options, runCycle] = typeof given === "function" ? [{}, given] : [given, function_];
    const where = `subsystem ${name}`;
    refuseUnknown(where, options, [...REGISTRATION_OPTIONS, "initialize", "status"]);
    if (this.subsystems.has(name)) {
      throw new OptionError(`${where} is declared twice; give one of them another name`);
    }
    const { initialize, status, ...registered } = options;
    for (const [option, hook] of Object.entries({ initialize, status })) {
      if (hook !== undefined && typeof hook !== "function") refuse(`${where}: ${option}`, hook, "a function");
    }
    if (typeof runCycle !== "function") refuse(where, runCycle, "a function as the last argument");
    this.subsystems.set(name, { registration: registration(name, registered), runCycle, initialize, status });
  }

  /**
   * Serves another gRPC service at the same endpoint. With TLS, its callers have a certificate of the same authority;
   * `uriOf` tells their identity, and the service decides what each may do.
   */
  service(definition: ServiceDefinition, implementation: UntypedServiceImplementation): void {
    this.services.push([definition, implementation]);
  }

  /**
   * Serves until SIGTERM or SIGINT, as `serve` does, and ends the process. A second signal ends it at once. It is the
   * last line of a program: a problem ends the process with one line and exit code 1.
   */
  async run(hooks: Hooks = {}): Promise<never> {
    let code = 0;
    const onSignal = () => (this.serving?.stopping.signal.aborted ? this.serving.cutOff.abort() : this.stop());
    const signals = ["SIGTERM", "SIGINT"] as const;
    for (const signal of signals) process.on(signal, onSignal);
    try {
      await this.serve(hooks);
    } catch (error) {
      if (!(error instanceof FleetError || error instanceof OptionError)) throw error;
      console.error(error.message);
      code = 1;
    }
    process.exit(code);
  }

  /** Stops as a signal does: running calls may end, and then new ones get UNAVAILABLE. */
  stop(): void {
    this.serving?.stopping.abort();
  }

  /**
   * Serves until `stop` is called.
   *
   * @throws FleetError if it can't listen, or a registration is invalid
   */
  async serve(hooks: Hooks = {}): Promise<void> {
    if (this.subsystems.size === 0) throw new FleetError("the fleet has no subsystem: call fleet.subsystem(NAME, …)");
    if (this.serving) throw new FleetError("the fleet is already being served");
    this.serving = { stopping: new AbortController(), cutOff: new AbortController() };
    try {
      await this.serveOnce(this.serving, hooks);
    } finally {
      this.serving = undefined;
    }
  }

  private async serveOnce({ stopping, cutOff }: Serving, hooks: Hooks): Promise<void> {
    const hosted = new Map([...this.subsystems].map(([name, it]) => [name, new Hosted(it, this.log)]));
    const health = new HealthImplementation({ "": "SERVING", [SUBSYSTEM_SERVICE]: "SERVING" });
    const server = new Server(SERVER_OPTIONS);
    server.addService(SUBSYSTEM, handlers(hosted, this.caller) as unknown as UntypedServiceImplementation);
    for (const [definition, implementation] of this.services) server.addService(definition, implementation);
    health.addToServer(server);
    const endpoint = await this.bind(server);
    this.log(`serving ${[...hosted.keys()].join(", ")} at ${endpoint}`);
    hooks.onListening?.(endpoint);

    const registrar = this.registrar(endpoint, hooks);
    let invalid: unknown;
    const kept = registrar?.keep(stopping.signal).catch((error: unknown) => {
      invalid = error;
      stopping.abort();
    });
    await new Promise<void>((resolve) => {
      if (stopping.signal.aborted) resolve();
      stopping.signal.addEventListener("abort", () => resolve());
    });
    await kept;

    const ending = new AbortController();
    const isCutOff = AbortSignal.any([cutOff.signal, ending.signal]);
    const end = Date.now() + this.graceMs;
    const within = async (limitMs: number, work: Promise<unknown>): Promise<boolean> => {
      const limit = setTimeout(Math.max(0, limitMs), false, { signal: isCutOff }).catch(() => false);
      return await Promise.race([work.then(() => true), limit]);
    };
    try {
      if (registrar && this.unregister) {
        if (!(await within(UNREGISTER_MS, registrar.unregister()))) {
          this.log(`not unregistered within ${UNREGISTER_MS / 1000} s, so the lease has to run out`);
        }
        await within(end - Date.now(), registrar.runningCyclesEnd(this.graceMs));
      }
      for (const service of ["", SUBSYSTEM_SERVICE]) health.setStatus(service, "NOT_SERVING");
      const drained = Promise.all([...hosted.values()].map((it) => it.drain()));
      if (!(await within(end - Date.now(), drained))) {
        this.log("running calls are cut off");
        for (const it of hosted.values()) it.close();
        await setTimeout(0); // Functions that end by their signal do so now.
        const left = [...hosted.values()].filter((it) => it.close() > 0).map(({ name }) => name);
        if (left.length > 0) this.log(`left behind, still running: ${left.join(", ")}`);
      }
      // The server waits for peers to close their connections, even for dead ones.
      await within(LAST_ANSWERS_MS, new Promise<void>((resolve) => server.tryShutdown(() => resolve())));
      server.forceShutdown();
    } finally {
      ending.abort();
    }
    if (invalid) throw invalid;
  }

  /** Listens, and returns the endpoint for registrations. */
  private async bind(server: Server): Promise<string> {
    const { target, isLocal, isUnix } = this.listen;
    const secure = this.credentials.hasCertificate;
    if (!secure && !isLocal) this.log(`listening on ${target} without TLS: anybody who can connect can call`);
    const credentials = this.credentials.serving();
    const port = await new Promise<number>((resolve, reject) =>
      server.bindAsync(target, credentials, (error, port) =>
        error ? reject(new FleetError(`can't listen on ${target}: ${error.message}`, { cause: error })) : resolve(port),
      ),
    );
    if (this.endpoint) return this.endpoint;
    return isUnix ? target : `${secure ? "https" : "http"}://${this.listen.host}:${port}`;
  }

  private registrar(endpoint: string, { onRegistered, onProblem }: Hooks): Registrar | undefined {
    if (!this.orchestrator) {
      const give = 'give orchestrator: "http://HOST:PORT" or ORCHESTRATOR_ADDRESS, or let others do it';
      this.log(`not registered: ${give}`);
      return undefined;
    }
    const registrations = [...this.subsystems.values()].map((it) => ({ ...it.registration, endpoint }));
    return new Registrar(this.orchestrator, this.credentials, registrations, this.leaseMs, {
      log: this.log,
      registered: () => onRegistered?.(),
      problem: (problem) => onProblem?.(problem),
    });
  }
}
