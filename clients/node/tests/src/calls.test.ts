// The rules of the contract, over real gRPC.

import assert from "node:assert/strict";
import { test } from "node:test";
import { status, type ServiceError } from "@grpc/grpc-js";
import {
  Cycle,
  Failure,
  Fleet,
  Unavailable,
  type FleetOptions,
  type RunCycle,
  type SubsystemOptions,
} from "dreamnet-subsystem";
import { fromStruct, toStruct } from "../../subsystem/dist/objects.js";
import { event, serving } from "./support.js";

function fleetOf(run: RunCycle, options: SubsystemOptions = {}, fleetOptions: FleetOptions = {}): Fleet {
  const fleet = new Fleet({ orchestrator: "", log: () => {}, ...fleetOptions });
  fleet.subsystem("it", options, run);
  return fleet;
}

/** Work that runs until it is let through. It counts how often it began. */
class Gate {
  begun = 0;
  readonly stopped: string[] = [];
  private readonly begins: Array<() => void> = [];
  private readonly ends: Array<() => void> = [];
  private open = event();

  readonly run = async ({ signal }: Cycle) => {
    const mine = ++this.begun;
    this.begins.shift()?.();
    const abort = event();
    signal.addEventListener("abort", () => abort.happen());
    await Promise.race([this.open.happened, abort.happened]);
    if (signal.aborted) {
      this.stopped.push((signal.reason as Error).message);
      this.ends.shift()?.();
      throw signal.reason;
    }
    return { begun: mine };
  };

  /** Resolves when work begins next. */
  nextBegin(): Promise<void> {
    return new Promise((resolve) => this.begins.push(resolve));
  }

  /** Resolves when work is stopped next. */
  nextStop(): Promise<void> {
    return new Promise((resolve) => this.ends.push(resolve));
  }

  letThrough(): void {
    this.open.happen();
  }

  close(): void {
    this.open = event();
  }
}

const failsWith =
  (code: keyof typeof status, message: RegExp | string = "") =>
  (error: ServiceError) => {
    assert.equal(status[error.code], code, error.details);
    assert.match(error.details, typeof message === "string" ? new RegExp(message) : message);
    return true;
  };

test("a function gets the request, and its answer is sent", async () => {
  const seen: Cycle[] = [];
  const { caller } = await serving(
    fleetOf((cycle) => {
      seen.push(cycle);
      cycle.metric("mean", 2);
      cycle.issue("OLD", "y is old", "INFO");
      return { list: [1, null, { a: true }], text: "é", empty: {}, none: [], left: undefined, at: new Date(0) };
    }),
  );
  const inputs = {
    x: { output: toStruct("x", { v: 1 }), freshness: "FRESHNESS_FRESH", cycleId: 7 },
    y: { output: toStruct("y", { v: 2 }), freshness: "FRESHNESS_STALE", cycleId: 5 },
    z: {},
  } as const;
  const metadata = { traceparent: "00-1-2-01", tracestate: "a=b", other: "x" };
  const answer = await caller.runCycle(7, { parameters: toStruct("p", { p: 1 }), inputs }, { metadata });
  const output = { list: [1, null, { a: true }], text: "é", empty: {}, none: [], at: "1970-01-01T00:00:00.000Z" };
  assert.deepEqual(fromStruct(answer.output), output);
  assert.deepEqual(answer.metrics, { mean: 2 });
  assert.deepEqual(answer.issues, [{ severity: "SEVERITY_INFO", code: "OLD", message: "y is old" }]);
  const given = seen[0]!;
  assert.deepEqual([given.subsystem, given.cycleId, given.epoch, given.attempt], ["it", 7, 1, 1]);
  assert.deepEqual(given.parameters, { p: 1 });
  assert.deepEqual(given.inputs.get("x"), { output: { v: 1 }, freshness: "FRESH", cycleId: 7 });
  assert.deepEqual(given.inputs.get("y"), { output: { v: 2 }, freshness: "STALE", cycleId: 5 });
  assert.deepEqual(given.inputs.get("z"), { output: {}, freshness: "ABSENT", cycleId: 0 });
  assert.throws(() => given.inputs.get("sensor"), /name it in requires, after or reads \(inputs: x, y, z\)/);
  assert.equal(given.traceparent, "00-1-2-01");
  assert.deepEqual(given.traceHeaders, { traceparent: "00-1-2-01", tracestate: "a=b" });
  assert.ok(given.remaining() > 0 && given.remaining() <= 60_000);
});

test("work is done once, also while the first call runs", async () => {
  const gate = new Gate();
  const { caller } = await serving(fleetOf(gate.run));
  const begins = gate.nextBegin();
  const calls = [1, 2, 3, 4].map((attempt) => caller.output(1, { attempt }));
  await begins;
  gate.letThrough();
  assert.deepEqual(await Promise.all(calls), Array(4).fill({ begun: 1 }));
  assert.deepEqual(await caller.output(1), { begun: 1 });
  assert.deepEqual(await caller.output(2), { begun: 2 });
  // Only the latest answer is kept: an earlier cycle is over, and is not done again.
  await assert.rejects(caller.runCycle(1), failsWith("ABORTED", "cycle 1 is over: cycle 2 has called"));
  assert.equal(gate.begun, 2);
});

test("a call after one that was cut off finds its work", async () => {
  const gate = new Gate();
  const { caller } = await serving(fleetOf(gate.run, { status: () => ({}) }));
  const begins = gate.nextBegin();
  const first = caller.runCycle(1);
  await begins;
  first.cancel();
  await assert.rejects(first, failsWith("CANCELLED"));
  const again = caller.output(1);
  await caller.status(); // It has come over the same connection, after that call.
  gate.letThrough();
  assert.deepEqual(await again, { begun: 1 });
});

test("work whose callers have gone is stopped", async () => {
  const gate = new Gate();
  const { caller } = await serving(fleetOf(gate.run));
  const begins = gate.nextBegin();
  const stops = gate.nextStop();
  const first = caller.runCycle(1);
  await begins;
  first.cancel();
  await assert.rejects(first);
  await stops;
  assert.deepEqual(gate.stopped, ["its callers have gone"]);
});

test("late work is stopped, and a call with time left does it again", async () => {
  const gate = new Gate();
  const { caller } = await serving(fleetOf(gate.run));
  await assert.rejects(caller.runCycle(1, {}, { timeoutMs: 200 }), failsWith("DEADLINE_EXCEEDED"));
  gate.letThrough();
  assert.ok(Number((await caller.output(1)).begun) <= 2);
});

test("a later cycle stops the work of an earlier one", async () => {
  const gate = new Gate();
  const { caller } = await serving(fleetOf((cycle) => (cycle.cycleId === 1 ? gate.run(cycle) : {})));
  const begins = gate.nextBegin();
  const first = caller.runCycle(1);
  const failed = assert.rejects(first, failsWith("ABORTED"));
  await begins;
  await caller.runCycle(2);
  await failed;
  assert.deepEqual(gate.stopped, ["cycle 2 has begun"]);
});

test("an older epoch is refused, and a newer one discards answers", async () => {
  const gate = new Gate();
  gate.letThrough();
  const { caller } = await serving(fleetOf(gate.run));
  await caller.output(5, { epoch: 2 });
  const over = "epoch 1 is over: epoch 2 has called; restart it if that one is gone";
  await assert.rejects(caller.runCycle(6), failsWith("ABORTED", over));
  await assert.rejects(caller.initialize({}, 1), failsWith("ABORTED"));
  assert.deepEqual(await caller.output(1, { epoch: 3 }), { begun: 2 });
});

test("a subsystem is initialized before its first cycle", async () => {
  const given: object[] = [];
  const initialize = (parameters: { bad?: unknown }) => {
    given.push(parameters);
    if (parameters.bad) throw new Failure("bad is not good");
  };
  const { caller } = await serving(fleetOf(() => ({ given: given.length }), { initialize }));
  await assert.rejects(caller.runCycle(1), failsWith("FAILED_PRECONDITION"));
  await caller.initialize({ a: 1 });
  assert.deepEqual(await caller.output(1), { given: 1 });
  // The last call counts, also if it fails.
  await assert.rejects(caller.initialize({ bad: true }), failsWith("UNKNOWN", "^bad is not good$"));
  await assert.rejects(caller.runCycle(2), failsWith("FAILED_PRECONDITION"));
  assert.deepEqual(given, [{ a: 1 }, { bad: true }]);
});

test("errors become codes with a message, and a stack in the log", async () => {
  const circular: Record<string, unknown> = {};
  circular.inner = { circular };
  let deep: object = {};
  for (let i = 0; i < 31; i++) deep = { deep };
  const log: string[] = [];
  let current: () => any = () => ({});
  const { caller } = await serving(fleetOf(async () => current(), {}, { log: (line) => log.push(line) }));
  const thrown = (error: unknown) => () => {
    throw error;
  };
  const cases: Array<[() => unknown, keyof typeof status, RegExp, boolean]> = [
    [thrown(new Unavailable("busy")), "UNAVAILABLE", /^busy$/, false],
    [thrown(new Failure("é".repeat(100_000))), "UNKNOWN", /^é{500}/, false],
    [thrown(new RangeError("no such seed")), "INTERNAL", /^RangeError: no such seed, at .*calls\.test\.js:\d+/, true],
    [thrown(undefined), "INTERNAL", /^undefined$/, true],
    [thrown(Object.create(null)), "INTERNAL", /./, true],
    [() => ({ prices: [1, Number.NaN] }), "INTERNAL", /^TypeError: output\.prices\[1\] is NaN/, true],
    [() => ({ id: 2n ** 60n }), "INTERNAL", /^TypeError: output\.id is a BigInt/, true],
    [() => [1], "INTERNAL", /it returned an Array as its output; return an object or nothing/, true],
    [() => ({ at: { x: new Map() } }), "INTERNAL", /output\.at\.x is a Map/, true],
    [() => circular, "INTERNAL", /output\.inner\.circular refers to an object that contains it/, true],
    [() => deep, "INTERNAL", /nests deeper than 30 objects/, true],
    [() => ({ half: "\ud800" }), "INTERNAL", /output\.half contains half of a surrogate pair/, true],
  ];
  for (const [number, [function_, code, message, isLogged]] of cases.entries()) {
    current = function_;
    log.length = 0;
    await assert.rejects(caller.runCycle(number + 1), (error: ServiceError) => {
      assert.ok(Buffer.byteLength(error.details) <= 1024);
      return failsWith(code, message)(error);
    });
    assert.equal(log.length, isLogged ? 1 : 0, log[0]);
    if (isLogged) assert.match(log[0]!, /^it: runCycle failed: /);
  }
  // A failure is not an answer, and the next call does the work.
  current = () => ({ ok: true });
  assert.deepEqual(await caller.output(cases.length), { ok: true });
});

test("other subsystems and snapshots are answered while one is busy", async () => {
  const gate = new Gate();
  const fleet = fleetOf(gate.run, { status: async () => ({ begun: gate.begun }) });
  fleet.subsystem("other", () => ({ other: true }));
  const { caller } = await serving(fleet);
  const begins = gate.nextBegin();
  const busy = caller.output(1);
  await begins;
  assert.deepEqual(await caller.output(1, { subsystem: "other" }), { other: true });
  assert.deepEqual(await caller.status(), { begun: 1 });
  await assert.rejects(caller.status("other"), failsWith("UNIMPLEMENTED", "other has no status"));
  gate.letThrough();
  await busy;
  await assert.rejects(
    caller.runCycle(1, { subsystem: "nobody" }),
    failsWith("NOT_FOUND", '"nobody" is not served here'),
  );
});

test("functions of one subsystem never overlap", async () => {
  let [running, most] = [0, 0];
  let [begun, end] = [event(), event()];
  const work = async () => {
    most = Math.max(most, ++running);
    begun.happen();
    await end.happened;
    running -= 1;
  };
  const { caller } = await serving(fleetOf(work, { initialize: work, status: () => ({}) }));
  end.happen();
  await caller.initialize();
  const pairs: Array<[() => Promise<unknown>, () => Promise<unknown>]> = [
    [() => caller.runCycle(1), () => caller.initialize()],
    [() => caller.initialize(), () => caller.runCycle(2)],
    [() => caller.initialize(), () => caller.initialize()],
  ];
  for (const [first, second] of pairs) {
    [begun, end] = [event(), event()];
    const firstEnds = Promise.allSettled([first()]);
    await begun.happened;
    const secondEnds = Promise.allSettled([second()]);
    await caller.status(); // It has come over the same connection, after both.
    end.happen();
    await Promise.all([firstEnds, secondEnds]);
  }
  assert.equal(most, 1);
});

test("inputs of sixty mebibytes arrive", async () => {
  const { caller } = await serving(fleetOf((cycle) => ({ n: String(cycle.inputs.get("x").output.t).length })));
  const large = { output: toStruct("x", { t: "x".repeat(60 * 1024 * 1024) }), freshness: "FRESHNESS_FRESH" } as const;
  assert.deepEqual(await caller.output(1, { inputs: { x: large } }), { n: 60 * 1024 * 1024 });
});

test("a function can be tested without a server", async () => {
  const cycle = new Cycle({ parameters: { a: 1 }, inputs: { sensor: { output: { value: 3 } } } });
  assert.deepEqual(cycle.inputs.get("sensor"), { output: { value: 3 }, freshness: "FRESH", cycleId: 0 });
  cycle.metric("m", 2);
  cycle.issue("CODE", "é".repeat(5000));
  cycle.check();
  await cycle.sleep(0);
  assert.deepEqual([cycle.metrics, cycle.traceparent, cycle.stopped], [{ m: 2 }, undefined, false]);
  const { message, severity } = cycle.issues[0]!;
  assert.ok(message.endsWith("é…") && Buffer.byteLength(message) <= 4096);
  assert.equal(severity, "WARNING");
  assert.throws(() => cycle.metric("", 1), /is not 1 to 128 bytes/);
  assert.throws(() => cycle.metric("m", Number.NaN), /metric m is NaN/);
  assert.throws(() => cycle.issue("x".repeat(129), ""), /more than 128 bytes/);
  assert.throws(() => cycle.issue("CODE", "", "BAD" as any), /BAD is not one of INFO, WARNING, ERROR/);
  const late = new Cycle({ deadline: 0 });
  assert.ok(late.stopped);
  assert.throws(() => late.check(), { name: "AbortError", message: "its deadline has passed" });
});
