// A real orchestrator, in memory, on a free port.

import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { credentials, type ServiceError } from "@grpc/grpc-js";
import { OrchestratorClient, SubsystemClient } from "../src/contract.js";
import type { RunCycleResponse__Output } from "../src/gen/dreamnet/subsystem/v1/RunCycleResponse.js";
import type { CycleTelemetry__Output } from "../src/gen/dreamnet/orchestrator/v1/CycleTelemetry.js";

const BINARY =
  process.env.TEST_ORCHESTRATOR ?? fileURLToPath(new URL("../../../../target/debug/orchestrator", import.meta.url));

/** A process that has printed its address. */
export interface Running {
  address: string;
  /** Sends SIGTERM and resolves with the exit code. */
  stop(): Promise<number | null>;
}

// A test that takes too long is ended by a signal; its processes would outlive it.
const children = new Set<ChildProcess>();
process.once("SIGTERM", () => {
  for (const child of children) child.kill("SIGKILL");
  process.exit(1);
});

async function start(command: string, args: string[]): Promise<Running> {
  const child: ChildProcess = spawn(command, args, { stdio: ["ignore", "pipe", "inherit"] });
  children.add(child);
  child.once("exit", () => children.delete(child));
  const exited = once(child, "exit") as Promise<[number | null]>;
  const line = await Promise.race([
    once(createInterface({ input: child.stdout! }), "line").then(([line]) => line as string),
    exited.then(([code]) => Promise.reject(new Error(`${command} ended with ${code} before it listened`))),
  ]);
  return {
    address: line.replace("listening on ", ""),
    async stop() {
      child.kill("SIGTERM");
      return (await exited)[0];
    },
  };
}

export const startOrchestrator = (listen = "127.0.0.1:0"): Promise<Running> =>
  start(BINARY, ["serve", "--listen", listen, "--admin-listen", "off", "--store", "memory:", "--log-filter", "error"]);

export const startSubsystem = (...args: string[]): Promise<Running> =>
  start(process.execPath, [fileURLToPath(new URL("../src/subsystem.js", import.meta.url)), "--listen", "127.0.0.1:0", ...args]);

/** Runs the stand-alone subsystem until it ends, with these arguments alone, and returns all that it prints. */
export async function runSubsystem(...args: string[]): Promise<{ code: number | null; output: string }> {
  const child = spawn(process.execPath, [fileURLToPath(new URL("../src/subsystem.js", import.meta.url)), ...args]);
  children.add(child);
  child.once("exit", () => children.delete(child));
  let output = "";
  for (const stream of [child.stdout, child.stderr]) stream.setEncoding("utf8").on("data", (text) => (output += text));
  const [code] = (await once(child, "close")) as [number | null];
  return { code, output };
}

type Callback = (error: ServiceError | null, answer?: any) => void;

function asking<C extends { close(): void }>(client: C) {
  return <A = any>(call: (client: C, callback: Callback) => void): Promise<A> =>
    new Promise<A>((resolve, reject) =>
      call(client, (error, answer) => (error ? reject(error) : resolve(answer))),
    ).finally(() => client.close());
}

export const orchestrator = (address: string) =>
  asking(new OrchestratorClient(address, credentials.createInsecure()));

export const subsystem = (address: string) => asking(new SubsystemClient(address, credentials.createInsecure()));

/** Runs a cycle and returns its whole record, with outputs. */
export async function cycle(address: string): Promise<CycleTelemetry__Output> {
  const answer = await orchestrator(address)((client, callback) => client.runCycle({ recordOutputs: true }, callback));
  return answer.telemetry;
}

/** Calls `RunCycle` of a subsystem as the orchestrator does. */
export const call = (address: string, name: string, cycleId: number, more = {}): Promise<RunCycleResponse__Output> =>
  subsystem(address)((client, callback) =>
    client.runCycle({ subsystem: name, cycleId, epoch: 1, attempt: 1, ...more }, callback),
  );
