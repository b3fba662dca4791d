// Calls of the orchestrator. They wait until it is up.

import { setTimeout } from "node:timers/promises";
import { status, type ServiceError } from "@grpc/grpc-js";
import { OrchestratorClient } from "./contract.js";
import type { Registration } from "./gen/dreamnet/orchestrator/v1/Registration.js";
import { describe } from "./thrown.js";
import { clientCredentials } from "./tls.js";

/** An orchestrator, and how long to wait for it. */
export interface Orchestrator {
  /** "HOST:PORT". */
  readonly address: string;
  /** Directory with the files of TLS. They are read for each call, so that it has a renewed certificate. */
  readonly credentials?: string | undefined;
  readonly waitSeconds: number;
}

type Client = InstanceType<typeof OrchestratorClient>;
type Deadline = { deadline: number };
type Callback<A> = (error: ServiceError | null, answer?: A) => void;

/** Timeout of calls that return at once. */
const ANSWER_MS = 10_000;

/** Waits until the orchestrator is up, calls it, and waits for the answer for `answerMs`, 10 s by default. */
export async function ask<A>(
  { address, credentials, waitSeconds }: Orchestrator,
  call: (client: Client, options: Deadline, callback: Callback<A>) => void,
  answerMs = ANSWER_MS,
): Promise<A> {
  // An orchestrator that starts is detected within a second.
  const client = new OrchestratorClient(address, clientCredentials(credentials), { "grpc.max_reconnect_backoff_ms": 1000 });
  const answer = <A>(call: (client: Client, options: Deadline, callback: Callback<A>) => void, ms: number) =>
    new Promise<A>((resolve, reject) =>
      call(client, { deadline: Date.now() + ms }, (error, answer) => (error ? reject(error) : resolve(answer!))),
    );
  const failure = (what: string, error: unknown) =>
    // The library ends some messages with the heading of a note that is missing.
    Object.assign(new Error(`the orchestrator at ${address} ${what.replace(/ Resolution note: *$/, "")}`, { cause: error }), {
      code: (error as ServiceError).code,
    });
  try {
    const isUp = await new Promise<boolean>((resolve) =>
      client.waitForReady(Date.now() + waitSeconds * 1000, (error) => resolve(!error)),
    );
    if (!isUp) {
      // Only a call returns the reason, or succeeds by now.
      await answer((client, options, callback) => client.getStatus({}, options, callback), ANSWER_MS).catch((error) => {
        const { code, details } = error as ServiceError;
        if (code !== status.UNAVAILABLE && code !== status.DEADLINE_EXCEEDED) return;
        const limit = waitSeconds > 0 ? ` within ${waitSeconds} s` : "";
        throw failure(`can't be reached${limit}: ${status[code]}: ${details}`, error);
      });
    }
    return await answer(call, answerMs).catch((error) => {
      const { code, details } = error as ServiceError;
      throw failure(`answered ${status[code]}: ${details}`, error);
    });
  } finally {
    client.close();
  }
}

/**
 * Registers with a lease and renews it, until the returned function is called. It also waits at most 10 s for
 * running cycles, which keep the subsystems until they end.
 */
export async function register(
  registrations: ReadonlyArray<Registration & { name: string }>,
  orchestrator: Orchestrator,
  leaseSeconds: number,
): Promise<() => Promise<void>> {
  const lease = duration(leaseSeconds * 1000);
  const registerOne = (registration: Registration, orchestrator: Orchestrator) =>
    ask(orchestrator, (client, options, callback) => client.registerSubsystem({ registration, lease }, options, callback));
  // It is retried soon, or no longer needed.
  const atOnce = { ...orchestrator, waitSeconds: 0 };
  const renewOne = async (registration: Registration & { name: string }) => {
    try {
      const { name } = registration;
      await ask(atOnce, (client, options, callback) => client.renewLease({ name }, options, callback));
    } catch (error) {
      // The lease has expired, or the subsystem was registered without one.
      const { code } = error as ServiceError;
      if (code !== status.NOT_FOUND && code !== status.FAILED_PRECONDITION) throw error;
      await registerOne(registration, atOnce);
    }
  };
  // A registration that can't be removed now ends with its lease.
  const unregister = (registered: typeof registrations) =>
    Promise.allSettled(
      registered.map(({ name }) =>
        ask(atOnce, (client, options, callback) => client.unregisterSubsystem({ name }, options, callback)),
      ),
    );
  for (const [position, registration] of registrations.entries()) {
    try {
      await registerOne(registration, orchestrator);
    } catch (error) {
      await unregister(registrations.slice(0, position));
      throw error;
    }
  }

  let renewal: Promise<unknown> = Promise.resolve();
  let renewing = false;
  const timer = setInterval(() => {
    if (renewing) return;
    renewing = true;
    renewal = Promise.allSettled(registrations.map(renewOne)).then((results) => {
      renewing = false;
      const failed = results.find((result) => result.status === "rejected");
      if (failed) console.error(`a lease was not renewed, retrying: ${describe(failed.reason)}`);
    });
  }, (leaseSeconds * 1000) / 3);
  return async () => {
    clearInterval(timer);
    await renewal;
    await unregister(registrations);
    await runningCyclesEnd(atOnce);
  };
}

/** Waits until the cycles that run now have ended, for at most 10 s. */
async function runningCyclesEnd(orchestrator: Orchestrator): Promise<void> {
  const running = async () => {
    const { status } = await ask<{ status: { runningCycles: Array<{ cycleId: number }> } | null }>(
      orchestrator,
      (client, options, callback) => client.getStatus({ omitLastCycle: true }, options, callback),
    );
    return status!.runningCycles.map(({ cycleId }) => cycleId);
  };
  try {
    const giveUp = Date.now() + ANSWER_MS;
    let left = await running();
    while (left.length > 0 && Date.now() < giveUp) {
      await setTimeout(50);
      const now = await running();
      left = left.filter((cycleId) => now.includes(cycleId));
    }
  } catch {
    // An orchestrator that is gone runs no cycle; one that enforces access may not tell.
  }
}

/** Milliseconds as a duration of the contract. */
export const duration = (ms: number) => ({
  seconds: Math.floor(ms / 1000),
  nanos: Math.min(Math.round((ms % 1000) * 1e6), 999_999_999),
});
