// The thread of the network: a fleet whose subsystems are modules of the main thread. It keeps the contract, the leases
// and the calls between processes while a module works or waits.

import { parentPort, workerData } from "node:worker_threads";
import {
  status,
  type sendUnaryData,
  type ServerUnaryCall,
  type ServerWritableStream,
  type ServiceError,
  type UntypedServiceImplementation,
} from "@grpc/grpc-js";
import { Failure, Fleet, type Cycle, type CycleFields } from "dreamnet-subsystem";
import { MODULES } from "./contract.js";
import type { CallRequest__Output } from "./gen/dreamnet/modules/v1/CallRequest.js";
import type { CallResponse } from "./gen/dreamnet/modules/v1/CallResponse.js";
import type { DescribeRequest__Output } from "./gen/dreamnet/modules/v1/DescribeRequest.js";
import type { DescribeResponse } from "./gen/dreamnet/modules/v1/DescribeResponse.js";
import type { Module } from "./gen/dreamnet/modules/v1/Module.js";
import type {
  Call,
  CallMessage,
  Declared,
  Described,
  Failed,
  Outcome,
  Result,
  Start,
  ToModules,
  ToNetwork,
} from "./messages.js";
import { Owners } from "./owners.js";

const { fleet: options, modules, peers, callTimeoutMs, calls, signal } = workerData as Start;

const work = parentPort!;
const tell = (message: ToModules) => work.postMessage(message);
const tellCalls = (message: CallMessage) => {
  calls.postMessage(message);
  // The thread of the modules may be waiting for it.
  Atomics.add(signal, 0, 1);
  Atomics.notify(signal, 0);
};

// -------------------------------------------------------------------------------------------- work of modules

let lastId = 0;
const waiting = new Map<number, (result: Extract<ToNetwork, { kind: "done" }>["result"]) => void>();

/** Asks the thread of the modules for work. */
async function ask<T extends object>(make: (id: number) => ToModules, stop?: AbortSignal): Promise<T> {
  const id = ++lastId;
  const done = new Promise<T | Failed>((resolve) => waiting.set(id, (result) => resolve(result as T)));
  const abort = () => tell({ kind: "abort", id, reason: (stop!.reason as Error).message });
  stop?.addEventListener("abort", abort);
  tell(make(id));
  try {
    const result = await done;
    if (!("failed" in result)) return result;
    const { failed, stopped } = result as Failed;
    throw stopped && stop?.aborted ? stop.reason : new Failure(failed, "INTERNAL");
  } finally {
    waiting.delete(id);
    stop?.removeEventListener("abort", abort);
  }
}

async function run({ name, calls }: Declared, cycle: Cycle): Promise<object> {
  const { described, missing, failed } = await owners.describe(calls, callTimeoutMs);
  // Others are between two registrations: their output is still there.
  const absent = missing.filter((name) => cycle.inputs.has(name) && cycle.inputs.get(name).freshness === "ABSENT");
  if (absent.length > 0) cycle.issue("NOT_SERVED", `no process serves ${absent.join(", ")}`);
  for (const { code, why, names } of failed) {
    // Subsystems of another kind have outputs only.
    const severity = code === status.UNIMPLEMENTED ? "INFO" : "WARNING";
    cycle.issue("NO_METHODS", `only the output of ${names.join(", ")} can be had: ${why}`, severity);
  }
  const { subsystem, cycleId, epoch, attempt, scheduledAt, parameters, traceHeaders, deadline } = cycle;
  const fields: CycleFields = { subsystem, cycleId, epoch, attempt, scheduledAt, parameters, traceHeaders, deadline };
  fields.inputs = Object.fromEntries(cycle.inputs);
  const make = (id: number): ToModules => ({ kind: "run", id, name, cycle: fields, described });
  const { output, metrics, issues } = await ask<Result>(make, cycle.signal);
  for (const [metric, value] of Object.entries(metrics)) cycle.metric(metric, value);
  for (const { code, message, severity } of issues) cycle.issue(code, message, severity);
  return output;
}

// -------------------------------------------------------------------------------------------- calls between processes

const owners = new Owners(options, new Set(modules.map(({ name }) => name)), peers);

/** The most calls of other processes that are in progress: far more than a cycle makes at a time. */
const MAX_INCOMING = 1000;

/** As many as inputs of a registration. The proto sets it. */
const MAX_NAMES = 1024;

/** Calls that come in, by their id, until their last outcome. */
const incoming = new Map<number, (outcome: Outcome | Described) => void>();

/** Takes each outcome of a call, or the description. */
function askModules(make: (id: number) => CallMessage, take: (outcome: Outcome | Described) => void): void {
  const id = ++lastId;
  incoming.set(id, (outcome) => {
    if (!("promised" in outcome)) incoming.delete(id);
    take(outcome);
  });
  tellCalls(make(id));
}

/** Why a call is refused, if it is. */
function refusal(
  call: ServerUnaryCall<any, any> | ServerWritableStream<any, any>,
  names: readonly string[],
): Partial<ServiceError> | undefined {
  const denied = owners.denies(call.getAuthContext().sslPeerCertificate);
  if (denied) return { code: status.PERMISSION_DENIED, details: denied };
  const unknown = names.find((name) => !modules.some((module) => module.name === name));
  if (unknown !== undefined) return { code: status.NOT_FOUND, details: `the module ${unknown} is not served here` };
  if (names.length > MAX_NAMES) {
    return { code: status.INVALID_ARGUMENT, details: `${names.length} names; give at most ${MAX_NAMES}` };
  }
  if (incoming.size >= MAX_INCOMING) {
    return { code: status.RESOURCE_EXHAUSTED, details: `${MAX_INCOMING} calls are in progress here` };
  }
  return undefined;
}

const service: UntypedServiceImplementation = {
  Describe(
    call: ServerUnaryCall<DescribeRequest__Output, DescribeResponse>,
    callback: sendUnaryData<DescribeResponse>,
  ) {
    const { names } = call.request;
    const refused = refusal(call, names);
    if (refused) return callback(refused);
    askModules(
      (id) => ({ kind: "describe", id, names }),
      (outcome) => {
        if ("described" in outcome) callback(null, { modules: outcome.described as Module[] });
        else callback({ code: status.INTERNAL, details: "failed" in outcome ? outcome.failed : "no description" });
      },
    );
  },
  Call(call: ServerWritableStream<CallRequest__Output, CallResponse>) {
    const { module, member, arguments: given } = call.request;
    const refused = refusal(call, [module]);
    if (refused) return void call.emit("error", refused);
    askModules(
      (id) => ({ kind: "call", id, call: { module, member, arguments: given } }),
      (outcome) => {
        if ("promised" in outcome) return void call.write({ promised: {} });
        if ("returned" in outcome) call.write({ returned: outcome.returned as Buffer });
        else if ("threw" in outcome) call.write({ threw: outcome.threw as Buffer });
        call.end();
      },
    );
  },
};

/** Calls a method of another process for the thread of the modules. */
async function call(id: number, called: Call): Promise<void> {
  const take = (outcome: Outcome) => tellCalls({ kind: "outcome", id, outcome });
  try {
    await owners.call(called, callTimeoutMs, take);
  } catch (error) {
    take({ failed: (error as Error).message });
  }
}

calls.on("message", async (message: CallMessage) => {
  switch (message.kind) {
    case "call":
      return void call(message.id, message.call);
    case "describe": {
      const { described, missing, failed } = await owners.describe(message.names, callTimeoutMs);
      const why = [...missing.map((name) => `no process serves ${name}`), ...failed.map(({ why }) => why)];
      const outcome = why.length > 0 ? { failed: why.join("; ") } : { described };
      return tellCalls({ kind: "outcome", id: message.id, outcome });
    }
    default:
      incoming.get(message.id)?.(message.outcome);
  }
});

// -------------------------------------------------------------------------------------------- the fleet

const fleet = new Fleet({ ...options, log: (line) => tell({ kind: "log", line }) });
for (const module of modules) {
  const { name, registration, hasStatus } = module;
  const status = () => ask<object>((id) => ({ kind: "status", id, name }));
  fleet.subsystem(name, { ...registration, ...(hasStatus && { status }) }, (cycle) => run(module, cycle));
}
fleet.service(MODULES, service);

work.on("message", (message: ToNetwork) => {
  if (message.kind === "stop") fleet.stop();
  else waiting.get(message.id)?.(message.result);
});

try {
  await fleet.serve({
    onListening: (endpoint) => tell({ kind: "listening", endpoint }),
    onRegistered: () => tell({ kind: "registered" }),
    onProblem: (problem) => tell({ kind: "problem", problem }),
  });
  tell({ kind: "ended" });
} catch (error) {
  const { name, message } = error as Error;
  tell({ kind: "ended", error: { name, message } });
}
owners.close();
work.close();
calls.close();
