// A module, as the thread of the network asks it for work: the rules of DreamNet for `run` and `status`.

import { Cycle, describeWithPlace, describeWithStack, type CycleFields, type JsonObject } from "dreamnet-subsystem";
import { isThenable, type Link } from "./link.js";
import type { Description, Result } from "./messages.js";
import { frozen, snapshot } from "./plain.js";
import { contextKey, ONLY_OUTPUT } from "./topology.js";

/** An existing module. `run` is given its declared inputs; a module that wants more takes the `cycle` as well. */
export interface Module {
  run?(context: any, cycle: Cycle): unknown;
  status?: unknown;
  getStatus?: unknown;
}

/** A run that failed, and its cycle. */
interface Failure {
  readonly epoch: number | undefined;
  readonly cycleId: number | undefined;
  readonly error: unknown;
}

export class Runner {
  private failure: Failure | undefined;

  constructor(
    readonly name: string,
    readonly object: Module,
    /** True if cycles run it; otherwise it is only read. */
    readonly isRun: boolean,
    /** Its inputs, without those of an `after` that only sets the sequence. */
    private readonly inputs: ReadonlySet<string>,
    private readonly objects: ReadonlyMap<string, Module>,
    private readonly link: Link,
    /** The live objects, which are never a part of an output. */
    private readonly live: ReadonlySet<unknown>,
  ) {}

  get hasStatus(): boolean {
    return typeof this.object.status === "function" || typeof this.object.getStatus === "function";
  }

  /** The names of the inputs of which it gets the methods. */
  get calls(): string[] {
    return this.isRun ? [...this.inputs].filter((name) => !this.objects.has(name) && !ONLY_OUTPUT.has(name)) : [];
  }

  /**
   * The result of its part in a cycle. Rejects with what the module threw: also if it is asked again, since it may have
   * done a part of its work. A module that ended because it was aborted can be asked again.
   */
  async run(fields: CycleFields & { signal: AbortSignal }, described: readonly Description[]): Promise<Result> {
    const { epoch, cycleId, signal } = fields;
    if (this.failure && this.failure.epoch === epoch && this.failure.cycleId === cycleId) throw this.failure.error;
    this.failure = undefined;
    try {
      return await this.runOnce(new Cycle(fields), described);
    } catch (error) {
      if (isAbort(error, signal)) throw error;
      this.failure = { epoch, cycleId, error };
      this.log(`failed in cycle ${cycleId}`, error);
      throw error;
    }
  }

  // Up to the first `await` this is synchronous, as is the copy of the result of a synchronous `run`: an object may be
  // changed after it was returned.
  private async runOnce(cycle: Cycle, described: readonly Description[]): Promise<Result> {
    const returned = this.isRun ? this.object.run!(this.contextOf(cycle, described), cycle) : this.read(cycle);
    const { output, dropped } = snapshot(isThenable(returned) ? await returned : returned, this.live);
    if (dropped.length > 0) cycle.issue("NOT_JSON", `left out of the output, or changed: ${dropped.join("; ")}`);
    return { output, metrics: cycle.metrics, issues: cycle.issues };
  }

  async status(): Promise<JsonObject> {
    return snapshot(await this.statusOf(), this.live).output;
  }

  log(what: string, error: unknown): void {
    console.error(`${this.name} ${what}: ${describeWithStack(error)}`);
  }

  // It succeeds, so that it does not count as failed, and its output is its status, for subsystems of other kinds. If
  // it were suspended instead, an operator could resume it, and those would get nothing.
  private async read(cycle: Cycle): Promise<unknown> {
    cycle.issue("READ_ONLY", `${this.name} is only read: cycles do not run it`, "INFO");
    try {
      return await this.statusOf();
    } catch (error) {
      this.log(`has no status in cycle ${cycle.cycleId}`, error);
      cycle.issue("NO_STATUS", describeWithPlace(error));
      return undefined;
    }
  }

  private statusOf(): unknown {
    const { status, getStatus } = this.object;
    if (typeof status === "function") return status.call(this.object);
    if (typeof getStatus === "function") return getStatus.call(this.object);
    return undefined;
  }

  private contextOf(cycle: Cycle, described: readonly Description[]): Record<string, unknown> {
    const remote = new Map(described.map((it) => [it.name, it]));
    const context: Record<string, unknown> = {};
    for (const [name, { output, freshness }] of cycle.inputs) {
      if (!this.inputs.has(name)) continue;
      const key = contextKey(name);
      const description = remote.get(name);
      if (this.objects.has(name) && !ONLY_OUTPUT.has(name)) context[key] = this.objects.get(name);
      else if (description) context[key] = this.link.standIn(description);
      else if (freshness !== "ABSENT") context[key] = frozen(output);
    }
    return context;
  }
}

/** True if work has ended because its signal was aborted. */
export function isAbort(error: unknown, signal: AbortSignal): boolean {
  return signal.aborted && (error === signal.reason || (error as Error | null | undefined)?.name === "AbortError");
}
