// The real service in memory on a free port, processes that listen, and a caller of subsystems like an orchestrator.

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { createServer, type AddressInfo } from "node:net";
import { createInterface } from "node:readline";
import { afterEach } from "node:test";
import { fileURLToPath } from "node:url";
import { Client, credentials, Metadata, type ChannelCredentials } from "@grpc/grpc-js";
import type { MethodDefinition } from "@grpc/proto-loader";
import { Orchestrator, type Fleet, type Hooks } from "dreamnet-subsystem";
import { SUBSYSTEM } from "../../subsystem/dist/contract.js";
import type { CycleTelemetry__Output } from "../../subsystem/dist/gen/dreamnet/orchestrator/v1/CycleTelemetry.js";
import type { RunCycleRequest } from "../../subsystem/dist/gen/dreamnet/subsystem/v1/RunCycleRequest.js";
import type { SubsystemDefinition } from "../../subsystem/dist/gen/dreamnet/subsystem/v1/Subsystem.js";
import { fromStruct, toStruct, type JsonObject } from "../../subsystem/dist/objects.js";

/** The service's program. */
export const PROGRAM =
  process.env.TEST_ORCHESTRATOR ?? fileURLToPath(new URL("../../../../target/debug/orchestrator", import.meta.url));

// A test that takes too long is ended by a signal; its processes would outlive it.
const children = new Set<ChildProcess>();
process.once("SIGTERM", () => {
  for (const child of children) child.kill("SIGKILL");
  process.exit(1);
});

function tracked(child: ChildProcess): ChildProcess {
  children.add(child);
  child.once("exit", () => children.delete(child));
  return child;
}

/** What a test has opened is closed when it ends, even if it fails; the latest first. */
const open: Array<() => unknown> = [];
afterEach(async () => {
  for (const close of open.splice(0).reverse()) await close();
});

/** Closes something at the end of the test. */
export const atEnd = (close: () => unknown): void => void open.push(close);

/** A process that has printed its address. */
export interface Running {
  address: string;
  /** Sends a signal and resolves with the exit code. */
  stop(signal?: NodeJS.Signals): Promise<number | null>;
  /** All that it has printed to stderr. */
  log(): string;
}

/** Starts a program and waits until it prints "listening on ADDRESS". */
export async function start(command: string, args: string[], env = {}): Promise<Running> {
  const child = tracked(spawn(command, args, { stdio: ["ignore", "pipe", "pipe"], env: { ...process.env, ...env } }));
  let log = "";
  child.stderr!.setEncoding("utf8").on("data", (text) => (log += text));
  const exited = once(child, "close") as Promise<[number | null]>;
  const line = await Promise.race([
    once(createInterface({ input: child.stdout! }), "line").then(([line]) => String(line)),
    exited.then(([code]) => Promise.reject(new Error(`${command} ended with ${code} before it listened: ${log}`))),
  ]);
  return {
    address: line.replace("listening on ", ""),
    log: () => log,
    async stop(signal = "SIGTERM") {
      child.kill(signal);
      return (await exited)[0];
    },
  };
}

/** Runs a program until it ends. */
export async function run(command: string, args: string[], options: { cwd?: string; env?: object } = {}) {
  const env = { ...process.env, ...options.env };
  const child = tracked(spawn(command, args, { stdio: ["ignore", "pipe", "pipe"], ...options, env }));
  const printed = { stdout: "", stderr: "" };
  for (const stream of ["stdout", "stderr"] as const) {
    child[stream]!.setEncoding("utf8").on("data", (text) => (printed[stream] += text));
  }
  const [code] = (await once(child, "close")) as [number | null];
  return { code, ...printed, output: printed.stdout + printed.stderr };
}

/** Starts the service. Without other arguments it keeps its store in memory. */
export const startOrchestrator = (listen = "127.0.0.1:0", ...args: string[]): Promise<Running> => {
  const store = args.some((arg) => arg === "--store") ? [] : ["--store", "memory:"];
  return start(PROGRAM, [
    "serve",
    "--listen",
    listen,
    "--admin-listen",
    "off",
    "--log-filter",
    "error",
    ...store,
    ...args,
  ]);
};

/** Of one call with the given orchestrator. */
export const orchestrator = (address: string): Orchestrator => new Orchestrator({ orchestrator: `http://${address}` });

/** Runs a cycle and returns its whole record, with outputs. */
export async function cycle(address: string): Promise<CycleTelemetry__Output> {
  const answer = await orchestrator(address).call("RunCycle", { recordOutputs: true }, Number.POSITIVE_INFINITY);
  return answer.telemetry!;
}

/** The registrations by name. */
export async function registered(address: string): Promise<Record<string, any>> {
  const { subsystems } = await orchestrator(address).call("ListSubsystems", { pageSize: 1000 });
  return Object.fromEntries(subsystems.map((it) => [it.registration!.name, it]));
}

/** Waits until the registry fulfills a condition. It has no stream of its changes, so this asks repeatedly. */
export async function untilRegistry(address: string, holds: (all: Record<string, any>) => boolean): Promise<void> {
  while (!holds(await registered(address)));
}

/** A promise, and the function that resolves it. */
export function event<T = void>(): { happened: Promise<T>; happen: (value: T) => void } {
  let happen!: (value: T) => void;
  const happened = new Promise<T>((resolve) => (happen = resolve));
  return { happened, happen };
}

/** An address whose server closes every connection. */
export async function nobodyThere() {
  const called = event();
  const nobody = createServer((socket) => {
    socket.destroy();
    called.happen();
  }).listen(0, "127.0.0.1");
  await once(nobody, "listening");
  const leave = () => once(nobody.close(), "close");
  return { address: `127.0.0.1:${(nobody.address() as AddressInfo).port}`, called: called.happened, leave };
}

type Asked<R extends keyof SubsystemDefinition> =
  SubsystemDefinition[R] extends MethodDefinition<infer Q, any, any, infer A> ? [Q, A] : never;

/** A call, its answer, and a way to cut it off. */
type Call<A> = Promise<A> & { cancel(): void };

/** Calls the subsystem `it`, or another one, over one connection. */
export class Caller {
  private readonly client: Client;

  constructor(
    readonly endpoint: string,
    tls: ChannelCredentials = credentials.createInsecure(),
  ) {
    const target = endpoint.replace(/^https?:\/\//, "");
    this.client = new Client(target, tls, {
      "grpc.max_receive_message_length": -1,
      "grpc.max_send_message_length": -1,
    });
    atEnd(() => this.client.close());
  }

  call<R extends keyof SubsystemDefinition>(
    rpc: R,
    request: Asked<R>[0],
    { metadata = {}, timeoutMs = 60_000 }: { metadata?: Record<string, string>; timeoutMs?: number } = {},
  ): Call<Asked<R>[1]> {
    const method = SUBSYSTEM[rpc] as unknown as MethodDefinition<Asked<R>[0], any, any, Asked<R>[1]>;
    const sent = new Metadata();
    for (const [key, value] of Object.entries(metadata)) sent.set(key, value);
    let cancel!: () => void;
    const answer = new Promise<Asked<R>[1]>((resolve, reject) => {
      const call = this.client.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize as (bytes: Buffer) => Asked<R>[1],
        request,
        sent,
        { deadline: Date.now() + timeoutMs },
        (error, made) => (error ? reject(error) : resolve(made!)),
      );
      cancel = () => call.cancel();
    });
    return Object.assign(answer, { cancel });
  }

  runCycle(cycleId: number, request: RunCycleRequest = {}, options = {}) {
    return this.call("RunCycle", { subsystem: "it", cycleId, epoch: 1, attempt: 1, ...request }, options);
  }

  initialize(parameters: JsonObject = {}, epoch = 1) {
    return this.call("Initialize", { subsystem: "it", epoch, parameters: toStruct("parameters", parameters) });
  }

  async output(cycleId: number, request: RunCycleRequest = {}): Promise<JsonObject> {
    return fromStruct((await this.runCycle(cycleId, request)).output);
  }

  async status(subsystem = "it"): Promise<JsonObject> {
    return fromStruct((await this.call("GetStatus", { subsystem })).status);
  }

  /** The status of `grpc.health.v1`, as its number on the wire: 1 is SERVING. */
  async health(): Promise<number> {
    return await new Promise((resolve, reject) =>
      this.client.makeUnaryRequest(
        "/grpc.health.v1.Health/Check",
        () => Buffer.alloc(0),
        (bytes) => bytes[1]!,
        {},
        (error, value) => (error ? reject(error) : resolve(value!)),
      ),
    );
  }
}

/** Serves a fleet until the end of the test. */
export async function serving(
  fleet: Fleet,
  hooks: Hooks = {},
): Promise<{ caller: Caller; endpoint: string; ended: Promise<void> }> {
  const listening = event<string>();
  const ended = fleet.serve({ ...hooks, onListening: listening.happen });
  const endpoint = await Promise.race([
    listening.happened,
    ended.then(() => Promise.reject(new Error("it has ended"))),
  ]);
  atEnd(async () => {
    fleet.stop();
    await ended.catch(() => {});
  });
  const caller = endpoint.startsWith("https") ? (undefined as unknown as Caller) : new Caller(endpoint);
  return { caller, endpoint, ended };
}
