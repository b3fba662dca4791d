// Registrations with a lease: made, renewed, made again after a loss, and removed at the end.

import { setTimeout } from "node:timers/promises";
import { Client, status, type ServiceError } from "@grpc/grpc-js";
import { ORCHESTRATOR } from "./contract.js";
import type { Address, Credentials } from "./credentials.js";
import { FleetError, OptionError } from "./errors.js";
import type { Registration } from "./gen/dreamnet/orchestrator/v1/Registration.js";
import { toDuration } from "./options.js";
import { callOnce, type AnswerOf, type RequestOf, type Rpc } from "./orchestrator.js";

const CALL_MS = 5000; // For each call. It only writes a row.
const FIRST_PAUSE_MS = 250; // After the first failure; then doubled, up to the time between two renewals.
const POLL_MS = 50; // Between two looks at the running cycles.

/** A problem that keeps subsystems from being registered. It is tried again. */
export interface Problem {
  readonly message: string;
  /** The status code of the orchestrator's answer. Undefined if the files of the credentials can't be read. */
  readonly code: status | undefined;
}

/** What the owner of registrations wants to know. */
export interface Observer {
  log(line: string): void;
  /** Called when all of them have been made, for the first time. */
  registered(): void;
  /** Called once for each problem, however long it lasts. */
  problem(problem: Problem): void;
}

/** Keeps these registrations with an orchestrator. */
export class Registrar {
  private readonly registered = new Set<string>();
  /** The problems that last, by the name of a subsystem, or "" for all. */
  private readonly reported = new Map<string, string>();

  constructor(
    private readonly orchestrator: Address,
    private readonly credentials: Credentials,
    private readonly registrations: ReadonlyArray<Registration & { name: string }>,
    private readonly leaseMs: number,
    private readonly observer: Observer,
  ) {}

  /**
   * Registers and renews until it is aborted. An orchestrator that can't be reached is tried again without a limit: it
   * may be restarting.
   *
   * @throws FleetError if a registration is invalid
   */
  async keep(signal: AbortSignal): Promise<void> {
    const renewalMs = this.leaseMs / 3;
    let pauseMs = FIRST_PAUSE_MS;
    let isNew = true;
    while (!signal.aborted) {
      try {
        // After a failure, a new connection: it uses the certificate as it is then.
        await this.connected(async (client) => {
          while (!signal.aborted) {
            for (const registration of this.registrations) {
              if (!signal.aborted) await this.keepOne(client, registration);
            }
            if (this.reported.delete("")) {
              this.observer.log(`subsystems are registered with ${this.orchestrator.url}`);
            }
            pauseMs = FIRST_PAUSE_MS;
            if (isNew && !signal.aborted) this.observer.registered();
            isNew = false;
            await pause(renewalMs, signal);
          }
        });
      } catch (error) {
        if (error instanceof FleetError) throw error;
        this.report("", error);
        // Subsystems that lost the same orchestrator don't all come back at the same moment.
        await pause(pauseMs * (0.5 + Math.random() / 2), signal);
        pauseMs = Math.min(2 * pauseMs, renewalMs);
      }
    }
  }

  /** Removes the registrations that are still those of this process. Tries once. */
  async unregister(): Promise<void> {
    if (this.registered.size === 0) return;
    try {
      await this.connected(async (client) => {
        for (const registration of this.registrations) {
          const { name } = registration;
          if (!this.registered.has(name) || !(await this.isOurs(client, registration))) continue;
          await this.call(client, "UnregisterSubsystem", { name });
          this.observer.log(`${name} is unregistered`);
        }
      });
    } catch (error) {
      this.observer.log(`not unregistered, so the lease has to run out: ${problemOf(error).message}`);
    }
  }

  /**
   * Waits until the cycles that run now have ended, for this long at most: each still calls the subsystems with which
   * it began.
   */
  async runningCyclesEnd(limitMs: number): Promise<void> {
    if (this.registered.size === 0) return;
    const giveUp = Date.now() + limitMs;
    try {
      await this.connected(async (client) => {
        const running = async () => {
          const { status } = await this.call(client, "GetStatus", { omitLastCycle: true });
          return (status?.runningCycles ?? []).map(({ cycleId }) => cycleId);
        };
        let left = await running();
        while (left.length > 0 && Date.now() < giveUp) {
          await setTimeout(POLL_MS);
          const now = await running();
          left = left.filter((cycleId) => now.includes(cycleId));
        }
      });
    } catch {
      // An orchestrator that is gone runs no cycle; one that enforces access may not tell.
    }
  }

  private async keepOne(client: Client, registration: Registration & { name: string }): Promise<void> {
    const { name } = registration;
    if (this.registered.has(name)) {
      try {
        await this.call(client, "RenewLease", { name });
        return;
      } catch (error) {
        // The lease has run out, or somebody has registered the name without one.
        const { code, details } = error as ServiceError;
        if (code !== status.NOT_FOUND && code !== status.FAILED_PRECONDITION) throw error;
        this.registered.delete(name);
        this.observer.log(`${name} has lost its lease: ${details}; registering it again`);
      }
    }
    try {
      await this.call(client, "RegisterSubsystem", { registration, lease: toDuration(this.leaseMs) });
    } catch (error) {
      const { code, details } = error as ServiceError;
      if (code === status.INVALID_ARGUMENT) throw new FleetError(`subsystem ${name}: ${details}`);
      if (code !== status.FAILED_PRECONDITION) throw error;
      this.report(name, error); // The configuration file declares it, or it has another name now.
      return;
    }
    this.registered.add(name);
    this.reported.delete(name);
    this.observer.log(`${name} is registered as ${registration.endpoint} with ${this.orchestrator.url}`);
  }

  /** False if a successor of this process has already registered the name. */
  private async isOurs(client: Client, { name, endpoint }: Registration & { name: string }): Promise<boolean> {
    try {
      const { subsystem } = await this.call(client, "GetSubsystem", { name });
      return subsystem?.registration?.endpoint === endpoint;
    } catch (error) {
      if ((error as ServiceError).code === status.NOT_FOUND) return false;
      // It may register, but not read.
      if ((error as ServiceError).code === status.PERMISSION_DENIED) return true;
      throw error;
    }
  }

  private call<R extends Rpc>(client: Client, rpc: R, request: RequestOf<R>): Promise<AnswerOf<R>> {
    return callOnce(client, ORCHESTRATOR[rpc] as any, request, this.credentials, CALL_MS) as Promise<AnswerOf<R>>;
  }

  private async connected(use: (client: Client) => Promise<void>): Promise<void> {
    const client = new Client(this.orchestrator.target, this.credentials.connecting(this.orchestrator));
    try {
      await use(client);
    } finally {
      client.close();
    }
  }

  private report(name: string, error: unknown): void {
    const problem = problemOf(error);
    if (this.reported.get(name) === problem.message) return;
    this.reported.set(name, problem.message);
    const subject = name ? `${name} is` : "subsystems are";
    this.observer.log(`${subject} not registered with ${this.orchestrator.url}: ${problem.message}; trying again`);
    if (!name) this.observer.problem(problem);
  }
}

function problemOf(error: unknown): Problem {
  // The files of the certificate or token are being replaced.
  if (error instanceof OptionError) return { message: error.message, code: undefined };
  const { code, details } = error as ServiceError;
  if (status[code] === undefined) throw error;
  return { message: `${status[code]}: ${details.replace(/ Resolution note: *$/, "").replace(/\.$/, "")}`, code };
}

/** Waits; a signal ends the wait. */
async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await setTimeout(ms, undefined, { signal }).catch(() => {});
}
