// The rules of the contract: which calls do work, wait for it, or are refused.
//
// * Work is done once. A repeated call of (`cycleId`, `subsystem`) gets the first answer, and waits for it while the
//   work still runs. Only the answer of a subsystem's latest cycle is kept: its cycles never overlap, and their ids
//   increase. A failure is not an answer: a call after it does the work again.
// * The functions of one subsystem never overlap, except `status`; those of different subsystems may.
// * Work is told to stop when its answer can't be used any more: its deadline has passed, its callers have gone for
//   ABANDONED_MS, or a later cycle or epoch calls. A connection that broke looks like a caller that has gone, but is
//   followed by another call, which must find the work and not do it twice.
// * A lower epoch than one already seen gets ABORTED, and a name that is not served here NOT_FOUND.

import { status as codes, type sendUnaryData, type ServerUnaryCall } from "@grpc/grpc-js";
import { uriOf } from "./credentials.js";
import { Cycle, type Input } from "./cycle.js";
import { describeWithPlace, describeWithStack, Failure, shortened, Stopped, Unavailable } from "./errors.js";
import type { Registration } from "./gen/dreamnet/orchestrator/v1/Registration.js";
import type { GetStatusRequest__Output } from "./gen/dreamnet/subsystem/v1/GetStatusRequest.js";
import type { GetStatusResponse } from "./gen/dreamnet/subsystem/v1/GetStatusResponse.js";
import type { InitializeRequest__Output } from "./gen/dreamnet/subsystem/v1/InitializeRequest.js";
import type { InitializeResponse } from "./gen/dreamnet/subsystem/v1/InitializeResponse.js";
import type { Input__Output } from "./gen/dreamnet/subsystem/v1/Input.js";
import type { RunCycleRequest__Output } from "./gen/dreamnet/subsystem/v1/RunCycleRequest.js";
import type { RunCycleResponse } from "./gen/dreamnet/subsystem/v1/RunCycleResponse.js";
import type { SubsystemHandlers } from "./gen/dreamnet/subsystem/v1/Subsystem.js";
import { fromStruct, kindOf, toStruct, type JsonObject } from "./objects.js";

const ABANDONED_MS = 5000; // In which a call is repeated after its connection broke.
const MAX_MESSAGE = 1024; // Bytes of an error's message: those that are recorded.

/** A result, or a promise of it. */
export type Awaitable<T> = T | Promise<T>;

/** What a function of a subsystem returns: an object that JSON can represent, or nothing for an empty one. */
// biome-ignore lint/suspicious/noConfusingVoidType: a function without a `return` is one
export type Output = object | null | undefined | void;

/** Does the part of a subsystem in a cycle. */
export type RunCycle = (cycle: Cycle) => Awaitable<Output>;

/** A registration, without its endpoint, and the functions that do its work. */
export interface Subsystem {
  readonly registration: Registration & { name: string };
  readonly runCycle: RunCycle;
  readonly initialize: ((parameters: JsonObject) => Awaitable<unknown>) | undefined;
  readonly status: (() => Awaitable<Output>) | undefined;
}

/** Of a call: when it ends, as of `Date.now()`, and whether its caller has gone. */
interface Caller {
  readonly deadline: number;
  readonly gone: AbortSignal;
}

/** Work that goes on without its callers, and the calls that wait for it. */
class Work<T> {
  readonly answer: Promise<T>;
  isDone = false;
  hasFailed = false;
  private readonly controller = new AbortController();
  private callers = 0;
  private timer: NodeJS.Timeout | undefined;

  constructor(
    run: (signal: AbortSignal) => Promise<T>,
    private deadline: number,
    readonly cycleId = 0,
  ) {
    this.answer = run(this.controller.signal).finally(() => {
      this.isDone = true;
      clearTimeout(this.timer);
    });
    // It has been reported, and may have no caller any more.
    this.answer.catch(() => (this.hasFailed = true));
  }

  /** Aborts the signal of the function, which may ignore it. */
  stop(reason: string): void {
    if (!this.isDone) this.controller.abort(new Stopped(reason));
  }

  /** The answer. Rejects with the function's failure, or with `Stopped`, also as soon as the caller has gone. */
  async join({ deadline, gone }: Caller): Promise<T> {
    this.callers += 1;
    this.deadline = Math.max(this.deadline, deadline);
    this.watch();
    let leave!: () => void;
    const left = new Promise<never>((_, reject) => {
      leave = () => reject(new Stopped("its caller has gone"));
      gone.addEventListener("abort", leave);
    });
    try {
      return await Promise.race([this.answer, left]);
    } finally {
      gone.removeEventListener("abort", leave);
      this.callers -= 1;
      this.watch();
    }
  }

  /** Sets the timer for the moment at which the work has to stop, if nothing changes until then. */
  private watch(): void {
    clearTimeout(this.timer);
    if (this.isDone) return;
    const abandoned = this.callers > 0 ? Number.POSITIVE_INFINITY : Date.now() + ABANDONED_MS;
    const at = Math.min(this.deadline, abandoned);
    if (at === Number.POSITIVE_INFINITY) return;
    const reason = at === abandoned ? "its callers have gone" : "its deadline has passed";
    this.timer = setTimeout(() => this.stop(reason), Math.max(0, at - Date.now()));
  }
}

/** A subsystem, and the rules of the contract for it. */
export class Hosted {
  private epoch = 0; // The highest so far.
  private isInitialized: boolean;
  private latest: Work<RunCycleResponse> | undefined;
  private readonly works = new Set<Work<unknown>>(); // All that run.
  private turn: Promise<void> | undefined; // Until the function that runs has ended.
  private status: Promise<GetStatusResponse> | undefined;
  private isDraining = false;

  constructor(
    private readonly subsystem: Subsystem,
    private readonly log: (line: string) => void,
  ) {
    this.isInitialized = subsystem.initialize === undefined;
  }

  get name(): string {
    return this.subsystem.registration.name;
  }

  async initialize(request: InitializeRequest__Output, caller: Caller): Promise<InitializeResponse> {
    this.enterEpoch(request.epoch);
    const { initialize } = this.subsystem;
    if (!initialize) return {};
    this.refuseIfDraining();
    const run = (signal: AbortSignal) =>
      this.inTurn(signal, async () => {
        this.isInitialized = false; // The last call counts, also if it fails.
        await this.guarded("initialize", signal, () => initialize(fromStruct(request.parameters)));
        this.isInitialized = true;
        return {};
      });
    return await this.begin(new Work(run, caller.deadline)).join(caller);
  }

  async runCycle(
    request: RunCycleRequest__Output,
    caller: Caller,
    traceHeaders: Readonly<Record<string, string>>,
  ): Promise<RunCycleResponse> {
    for (;;) {
      this.enterEpoch(request.epoch);
      if (!this.isInitialized) throw new Failure("not initialized: call Initialize first", "FAILED_PRECONDITION");
      const work = this.workOf(request, caller, traceHeaders);
      try {
        const answer = await work.join(caller);
        this.enterEpoch(request.epoch); // It may have been superseded meanwhile.
        return answer;
      } catch (error) {
        // It stopped because an earlier call ended; this one still waits, so the work begins again.
        const stillWaits = !this.isDraining && !caller.gone.aborted && Date.now() < caller.deadline;
        if (!(error instanceof Stopped) || !stillWaits) throw error;
      }
    }
  }

  async getStatus(): Promise<GetStatusResponse> {
    const { status } = this.subsystem;
    if (!status) throw new Failure(`${this.name} has no status`, "UNIMPLEMENTED");
    // Calls at the same time share one snapshot.
    this.status ??= this.guarded("status", undefined, async () => ({
      status: asObject("status", await status()),
    })).finally(() => (this.status = undefined));
    return await this.status;
  }

  /** Waits until no work is running; work that has not begun by now never does. */
  async drain(): Promise<void> {
    this.isDraining = true;
    while (this.works.size > 0) await Promise.allSettled([...this.works].map(({ answer }) => answer));
  }

  /** Stops whatever runs. Returns the number of works that still run. */
  close(): number {
    this.stopWorks("the process ends");
    return this.works.size;
  }

  private stopWorks(reason: string): void {
    for (const work of this.works) work.stop(reason);
  }

  /** Refuses a superseded caller. A new epoch ends the work and the answer of the old one. */
  private enterEpoch(epoch: number): void {
    if (epoch < this.epoch) {
      const over = `epoch ${epoch} is over: epoch ${this.epoch} has called`;
      throw new Failure(`${over}; restart ${this.name} if that one is gone`, "ABORTED");
    }
    if (epoch > this.epoch) {
      this.stopWorks(`epoch ${epoch} has begun`);
      this.epoch = epoch;
      this.latest = undefined;
    }
  }

  /** The work of this cycle, which begins now if it has not. */
  private workOf(
    request: RunCycleRequest__Output,
    caller: Caller,
    traceHeaders: Readonly<Record<string, string>>,
  ): Work<RunCycleResponse> {
    const { cycleId } = request;
    const { latest } = this;
    if (latest && cycleId < latest.cycleId) {
      throw new Failure(`cycle ${cycleId} is over: cycle ${latest.cycleId} has called`, "ABORTED");
    }
    if (latest && cycleId === latest.cycleId && !latest.hasFailed) return latest;
    this.refuseIfDraining();
    if (latest && cycleId > latest.cycleId) latest.stop(`cycle ${cycleId} has begun`);
    const run = (signal: AbortSignal) =>
      this.inTurn(signal, () =>
        this.guarded("runCycle", signal, async () => {
          const cycle = toCycle(request, caller.deadline, signal, traceHeaders);
          return toResponse(await this.subsystem.runCycle(cycle), cycle);
        }),
      );
    this.latest = this.begin(new Work(run, caller.deadline, cycleId));
    return this.latest;
  }

  private begin<T>(work: Work<T>): Work<T> {
    this.works.add(work);
    const ended = () => this.works.delete(work);
    work.answer.then(ended, ended);
    return work;
  }

  private refuseIfDraining(): void {
    if (this.isDraining) throw new Unavailable(`${this.name} is shutting down`);
  }

  /** Runs the function when no other one of this subsystem does. */
  private async inTurn<T>(signal: AbortSignal, run: () => Promise<T>): Promise<T> {
    while (this.turn) {
      await Promise.race([this.turn, aborted(signal)]);
      signal.throwIfAborted();
    }
    const running = run();
    const ended = () => {
      this.turn = undefined;
    };
    this.turn = running.then(ended, ended);
    return await running;
  }

  /** The result of a function. Rejects with `Failure`, or with `Stopped` if it ended because of the signal. */
  private async guarded<T>(what: string, signal: AbortSignal | undefined, run: () => Awaitable<T>): Promise<T> {
    try {
      return await run();
    } catch (error) {
      if (error instanceof Failure) throw error;
      const isAbort = error === signal?.reason || (error as Error | null | undefined)?.name === "AbortError";
      if (signal?.aborted && isAbort) throw signal.reason;
      this.log(`${this.name}: ${what} failed: ${describeWithStack(error)}`);
      throw new Failure(describeWithPlace(error), "INTERNAL");
    }
  }
}

/** Resolves when the signal is aborted. */
const aborted = (signal: AbortSignal) =>
  new Promise<void>((resolve) => {
    if (signal.aborted) resolve();
    signal.addEventListener("abort", () => resolve(), { once: true });
  });

const TRACE_HEADERS = ["traceparent", "tracestate"];

/**
 * The contract's service, for all subsystems behind one endpoint. With a `uri`, only the client with this URI in its
 * certificate may call: the authority has signed the certificates of other subsystems as well.
 */
export function handlers(hosted: ReadonlyMap<string, Hosted>, uri: string | undefined): SubsystemHandlers {
  const called = (name: string, call: ServerUnaryCall<any, any>): Hosted => {
    if (uri !== undefined && uriOf(call.getAuthContext().sslPeerCertificate) !== uri) {
      throw new Failure(`only ${uri} may call`, "PERMISSION_DENIED");
    }
    const subsystem = hosted.get(name);
    if (subsystem) return subsystem;
    const shown = JSON.stringify(name.slice(0, 63));
    throw new Failure(`${shown} is not served here; check its endpoint in the registration`, "NOT_FOUND");
  };
  const unary =
    <Q extends { subsystem: string }, A>(
      answer: (subsystem: Hosted, request: Q, caller: Caller, call: ServerUnaryCall<Q, A>) => Promise<A>,
    ) =>
    (call: ServerUnaryCall<Q, A>, callback: sendUnaryData<A>): void => {
      const gone = new AbortController();
      call.on("cancelled", () => gone.abort());
      const caller = { deadline: Number(call.getDeadline()), gone: gone.signal };
      Promise.resolve()
        .then(() => answer(called(call.request.subsystem, call), call.request, caller, call))
        .then(
          (made) => callback(null, made),
          (error) => callback(refusal(error, caller)),
        );
    };
  return {
    Initialize: unary<InitializeRequest__Output, InitializeResponse>((subsystem, request, caller) =>
      subsystem.initialize(request, caller),
    ),
    RunCycle: unary<RunCycleRequest__Output, RunCycleResponse>((subsystem, request, caller, call) => {
      const traced = TRACE_HEADERS.flatMap((header) =>
        call.metadata.get(header).map((value) => [header, String(value)]),
      );
      return subsystem.runCycle(request, caller, Object.fromEntries(traced));
    }),
    GetStatus: unary<GetStatusRequest__Output, GetStatusResponse>((subsystem) => subsystem.getStatus()),
  };
}

function refusal(error: unknown, { deadline }: Caller): { code: codes; details: string } {
  if (error instanceof Failure) return { code: codes[error.code], details: shortened(error.message, MAX_MESSAGE) };
  if (error instanceof Stopped) {
    const code = Date.now() >= deadline ? codes.DEADLINE_EXCEEDED : codes.CANCELLED;
    return { code, details: `stopped: ${error.message}` };
  }
  return { code: codes.INTERNAL, details: shortened(describeWithPlace(error), MAX_MESSAGE) };
}

// -------------------------------------------------------------------------------------------- messages

function toCycle(
  request: RunCycleRequest__Output,
  deadline: number,
  signal: AbortSignal,
  traceHeaders: Readonly<Record<string, string>>,
): Cycle {
  const { scheduledAt } = request;
  return new Cycle({
    subsystem: request.subsystem,
    cycleId: request.cycleId,
    epoch: request.epoch,
    attempt: request.attempt,
    scheduledAt: scheduledAt ? new Date(Number(scheduledAt.seconds) * 1000 + scheduledAt.nanos / 1e6) : undefined,
    parameters: fromStruct(request.parameters),
    inputs: Object.fromEntries(Object.entries(request.inputs).map(([name, input]) => [name, toInput(input)])),
    traceHeaders,
    deadline,
    signal,
  });
}

function toInput({ freshness, output, cycleId }: Input__Output): Input {
  if (freshness === "FRESHNESS_FRESH") return { output: fromStruct(output), freshness: "FRESH", cycleId };
  if (freshness === "FRESHNESS_STALE") return { output: fromStruct(output), freshness: "STALE", cycleId };
  return { output: {}, freshness: "ABSENT", cycleId: 0 };
}

function asObject(what: string, given: Output) {
  if (given === null || given === undefined) return toStruct(what, {});
  if (typeof given === "object" && !Array.isArray(given)) return toStruct(what, given);
  throw new TypeError(`it returned ${kindOf(given)} as its ${what}; return an object or nothing`);
}

function toResponse(output: Output, { metrics, issues }: Cycle): RunCycleResponse {
  return {
    output: asObject("output", output),
    metrics,
    issues: issues.map(({ severity, code, message }) => ({ severity: `SEVERITY_${severity}`, code, message })),
  };
}
