// Against the real service: the binary TEST_ORCHESTRATOR, or the one in `target/debug`.

import assert from "node:assert/strict";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer, type AddressInfo } from "node:net";
import { after, afterEach, before, test } from "node:test";
import { status } from "@grpc/grpc-js";
import {
  getStatus,
  READ_ONLY,
  runSingleCycle,
  serveSubsystems,
  startIntervalLoop,
  stopServing,
  type Cycle,
  type IntervalLoop,
  type OrchestratorContext,
  type Servable,
} from "../src/dreamnet.js";
import { contextKey, TOPOLOGY, type Settings } from "../src/topology.js";
import { call, cycle, orchestrator, runSubsystem, startOrchestrator, startSubsystem, subsystem, type Running } from "./support.js";

const NAMES = Object.keys(TOPOLOGY) as Array<keyof typeof TOPOLOGY>;
const inputsOf = ({ requires = [], after = [], reads = [] }: Settings) => new Set([...requires, ...after, ...reads]);

let service: Running;
before(async () => {
  service = await startOrchestrator();
});
after(async () => assert.equal(await service.stop(), 0));

// Resources of a test are closed when it ends, even if it fails.
const open: Array<() => Promise<unknown>> = [];
afterEach(() => Promise.all(open.splice(0).map((close) => close())));

const serve = async (...args: Parameters<typeof serveSubsystems>) => {
  const served = await serveSubsystems(...args);
  open.push(() => served.stop());
  return served;
};
const familiar = <C extends object>(context: C): C => {
  open.push(() => stopServing(context as OrchestratorContext));
  return context;
};

const loopOf = (...args: Parameters<typeof startIntervalLoop>): IntervalLoop => {
  const loop = startIntervalLoop(...args);
  open.push(() => loop.stop());
  return loop;
};

/** An address whose server closes every connection. */
async function nobodyThere() {
  let call!: () => void;
  const called = new Promise<void>((resolve) => (call = resolve));
  const nobody = createServer((socket) => {
    socket.destroy();
    call();
  }).listen(0, "127.0.0.1");
  await once(nobody, "listening");
  const leave = () => once(nobody.close(), "close");
  return { address: `127.0.0.1:${(nobody.address() as AddressInfo).port}`, called, leave };
}

// A copy of this folder does not have this file.
const TOML = new URL("../../../dreamnet.toml", import.meta.url);

test("the topology is that of examples/dreamnet.toml", { skip: !existsSync(TOML) }, async () => {
  const toml = await readFile(TOML, "utf8");
  const declared = toml.split("[[subsystems]]").slice(1).map((text) => {
    const list = (key: string) =>
      [...(text.match(new RegExp(`^${key} = \\[([^\\]]*)\\]`, "m"))?.[1] ?? "").matchAll(/"(\w+)"/g)].map((m) => m[1]);
    const [, name] = text.match(/^name = "(\w+)"/m)!;
    return [name, { phase: Number(text.match(/^phase = (\d+)/m)![1]), after: list("after"), reads: list("reads") }];
  });
  assert.deepEqual(declared, Object.entries(TOPOLOGY));
});

test("keys follow from the names, except for three", () => {
  assert.deepEqual(
    ["FieldLayer", "DreamNetOSCore", "CitadelCore", "StarBridgeLungs", "PredatorScavengerLoop"].map(contextKey),
    ["fieldLayer", "dreamNetOSCore", "citadelSnapshot", "starBridge", "predatorScavenger"],
  );
  // A property that every object has is not a key.
  assert.deepEqual(["constructor", "toString", "valueOf"].map(contextKey), ["constructor", "toString", "valueOf"]);
});

test("concurrent modules still follow the phases and each `after`", async () => {
  const ended = new Set<string>();
  const objects = Object.fromEntries(
    NAMES.map((name) => [
      name,
      {
        async run(context: object) {
          const { phase, after } = TOPOLOGY[name] as Settings;
          const before = NAMES.filter((other) => (TOPOLOGY[other].phase ?? 0) < phase!);
          for (const other of [...before, ...after!]) assert.ok(ended.has(other), `${name} ran before ${other}`);
          assert.deepEqual(new Set(Object.keys(context)), new Set([...inputsOf(TOPOLOGY[name])].map(contextKey)));
          await new Promise((resolve) => setImmediate(resolve));
          ended.add(name);
        },
      },
    ]),
  );
  await serve(objects, { orchestrator: service.address, sequential: false, run: READ_ONLY });
  const telemetry = await cycle(service.address);
  assert.equal(telemetry.error, "");
  assert.deepEqual([...ended].sort(), [...NAMES].sort());
});

test("a module gets the same live objects, only those that it declares", async () => {
  const seen: Record<string, unknown>[] = [];
  const mesh = { run() {} };
  const objects = {
    NeuralMesh: mesh,
    StarBridgeLungs: { run() {} },
    PredatorScavengerLoop: { run() {} },
    IdentityGrid: { run() {} },
    FieldLayer: { run: (context: Record<string, unknown>) => void seen.push(context) },
  };
  await serve(objects, { orchestrator: service.address });
  await cycle(service.address);
  assert.deepEqual(Object.keys(seen[0]!).sort(), ["neuralMesh", "predatorScavenger", "starBridge"]);
  assert.equal(seen[0]!.neuralMesh, mesh);
  assert.equal(seen[0]!.starBridge, objects.StarBridgeLungs);
  assert.equal(seen[0]!.predatorScavenger, objects.PredatorScavengerLoop);
  assert.ok(!Object.isFrozen(mesh));
});

test("the `after` of the sequence offers nothing", async () => {
  const seen: string[][] = [];
  const run = (context: object) => void seen.push(Object.keys(context));
  await serve({ ZenGardenCore: { run }, DreamBetCore: { run } }, { orchestrator: service.address });
  await cycle(service.address);
  assert.deepEqual(seen, [[], []]);
});

test("a subsystem of another process is represented by its latest output, frozen", async () => {
  let seen: any;
  await serve({ NeuralMesh: { run: () => ({ nodes: [{ id: 1 }] }) } }, { orchestrator: service.address });
  await serve({ CitadelCore: { run(context: unknown) { seen = context; } } }, { orchestrator: service.address });
  await cycle(service.address);
  assert.equal(JSON.stringify(seen), '{"neuralMesh":{"nodes":[{"id":1}]}}');
  assert.throws(() => { seen.neuralMesh.nodes[0].id = 2; }, TypeError);
});

test("Citadel is represented by the result of its run, and a module outside of the 28 can be an input too", async () => {
  let seen: any;
  const agents = [{ id: "wolf" }];
  await serve(
    {
      CitadelCore: { run: async () => ({ snapshot: { plan: "grow" } }) },
      LatentCollaboration: { run(context: unknown) { seen = context; } },
      agents,
    },
    { orchestrator: service.address, registrations: { LatentCollaboration: { reads: ["agents"] } } },
  );
  await cycle(service.address);
  assert.deepEqual(Object.keys(seen).sort(), ["agents", "citadelSnapshot"]);
  assert.equal(JSON.stringify(seen.citadelSnapshot), '{"snapshot":{"plan":"grow"}}');
  assert.throws(() => { seen.citadelSnapshot.snapshot.plan = "shrink"; }, TypeError);
  assert.equal(seen.agents, agents);
});

test("given fields are registered, and the other ones are as in the table", async () => {
  const context = familiar({
    NeuralMesh: { run: () => new Promise(() => {}) },
    CitadelCore: { run: () => ({ fine: true }) },
    FieldLayer: { run: () => ({ fine: true }) },
  });
  const telemetry = await runSingleCycle(context, {
    orchestrator: service.address,
    registrations: {
      NeuralMesh: { timeout: { nanos: 50_000_000 }, critical: true },
      FieldLayer: { requires: ["NeuralMesh"], reads: [] },
    },
  });
  assert.match(telemetry.error!, /NeuralMesh/);
  const { subsystems } = await orchestrator(service.address)((client, callback) => client.listSubsystems({}, callback));
  const [citadel, field, mesh] = subsystems.map(({ registration }: any) => registration);
  assert.deepEqual([citadel.phase, citadel.reads, citadel.timeout.seconds], [10, ["NeuralMesh"], 10]);
  assert.deepEqual([field.phase, field.requires, field.reads], [20, ["NeuralMesh"], []]);
  assert.deepEqual([mesh.phase, mesh.timeout.nanos, mesh.critical], [0, 50_000_000, true]);
  const parts = subsystems.map(({ last }: any) => last.state);
  assert.deepEqual(parts, ["SUBSYSTEM_STATE_SUCCEEDED", "SUBSYSTEM_STATE_SKIPPED", "SUBSYSTEM_STATE_TIMED_OUT"]);
  await assert.rejects(serve({}, { registrations: { Nobody: {} } }), /registrations names Nobody/);
});

test("a module that waits for another one of its phase comes after it, in whatever order they are given", async () => {
  const order: string[] = [];
  const module = (name: string) => ({ run: () => void order.push(name) });
  await serve(
    { last: module("last"), middle: module("middle"), first: module("first") },
    { orchestrator: service.address, registrations: { last: { after: ["middle"] }, middle: { requires: ["first"] } } },
  );
  assert.equal((await cycle(service.address)).state, "CYCLE_STATE_SUCCEEDED");
  assert.deepEqual(order, ["first", "middle", "last"]);
});

test("if one registration is refused, none stays registered", async () => {
  const objects = { fine: { run() {} }, "no name!": { run() {} } };
  await assert.rejects(serve(objects, { orchestrator: service.address }), /"no name!" is not a name/);
  const { subsystems } = await orchestrator(service.address)((client, callback) => client.listSubsystems({}, callback));
  assert.deepEqual(subsystems, []);
});

test("a module that throws fails only its own subsystem", async (t) => {
  t.mock.method(console, "error", () => {});
  const throwing = (thrown: unknown): Servable => ({ run() { throw thrown; } });
  await serve(
    {
      ZenGardenCore: throwing(new Error("boom ".repeat(10_000))),
      DreamBetCore: throwing(undefined),
      NeuralMesh: { run: () => Promise.reject(Object.create(null)) },
      // biome-ignore lint/suspicious/noThenProperty: what a foreign module may return
      SocialHubCore: { run: () => ({ then() { throw new RangeError("late"); } }) },
      CitadelCore: { run: () => ({ fine: true }) },
    },
    { orchestrator: service.address },
  );
  const telemetry = await cycle(service.address);
  const states = Object.fromEntries(telemetry.subsystems.map(({ name, state, errorCode }) => [name, `${state} ${errorCode}`]));
  const failed = "SUBSYSTEM_STATE_FAILED INTERNAL";
  assert.deepEqual(states, {
    ZenGardenCore: failed,
    DreamBetCore: failed,
    NeuralMesh: failed,
    SocialHubCore: failed,
    CitadelCore: "SUBSYSTEM_STATE_SUCCEEDED ",
  });
  assert.equal(telemetry.state, "CYCLE_STATE_DEGRADED");
  assert.match(telemetry.error, /ZenGardenCore/);
});

test("an exception of a module is logged with its stack, and the orchestrator gets its place", async (t) => {
  const error = t.mock.method(console, "error", () => {});
  const logged = () => error.mock.calls.map((call) => String(call.arguments[0]));
  const cause = new RangeError("no such seed");
  function grow() { throw new TypeError("nothing grows", { cause }); }
  const served = await serve(
    {
      ZenGardenCore: { async run() { await null; grow(); }, status: () => grow() },
      DreamBetCore: { run() { throw "a text"; } },
      SocialHubCore: { run: () => new Promise((_, reject) => reject(Object.defineProperty(new Error("odd"), "stack", { get: grow }))) },
      WolfPack: { status: () => grow() },
    },
    { orchestrator: service.address },
  );
  const { subsystems } = await cycle(service.address);
  const part = (name: string) => subsystems.find((part) => part.name === name)!;
  const place = /^TypeError: nothing grows, at grow \(file:\/\/\/.*dreamnet\.test\.js:\d+:\d+\)$/;
  assert.match(part("ZenGardenCore").errorMessage, place);
  assert.equal(part("DreamBetCore").errorMessage, "a text");
  assert.equal(part("SocialHubCore").errorMessage, "Error: odd");
  assert.match(part("WolfPack").issues.find(({ code }) => code === "NO_STATUS")!.message, place);
  const garden = logged().find((line) => line.startsWith("ZenGardenCore failed in cycle "));
  assert.match(garden!, /TypeError: nothing grows\n +at grow .*\n +at .*run [\s\S]*no such seed/);
  for (const name of ["DreamBetCore failed", "SocialHubCore failed", "WolfPack has no status"]) {
    assert.ok(logged().some((line) => line.startsWith(`${name} in cycle `)), name);
  }
  // A repeated call gets the same answer, without another log entry.
  const lines = logged().length;
  const again = { cycleId: (await getStatus({ orchestrator: service.address })).lastCycle!.cycleId, epoch: 2 ** 50 };
  await assert.rejects(call(served.address, "DreamBetCore", again.cycleId, again), /a text/);
  await assert.rejects(call(served.address, "DreamBetCore", again.cycleId, again), /a text/);
  assert.equal(logged().length, lines + 1);
  await assert.rejects(
    subsystem(served.address)((client, callback) => client.getStatus({ subsystem: "ZenGardenCore" }, callback)),
    /nothing grows, at grow/,
  );
  assert.match(logged().at(-1)!, /^ZenGardenCore has no status: TypeError: nothing grows\n/);
});

test("odd outputs: an object that is mutated later, an array, nothing, and values that JSON can't represent", async () => {
  const same = { n: 0, inner: { n: 0 } };
  await serve(
    {
      ZenGardenCore: { run() { same.n = same.inner.n = 1; queueMicrotask(() => { same.n = same.inner.n = 2; }); return same; } },
      DreamBetCore: { run: async () => [1, undefined] },
      NeuralMesh: { run() {} },
      SocialHubCore: { run: () => ({ f() {}, big: 2n ** 60n, nan: NaN, ok: "yes" }) },
      LiquidityEngine: { run: () => ({ wei: 10 ** 18 }) },
      // biome-ignore lint/suspicious/noThenProperty: what a foreign module may return
      DreamShop: { run: () => ({ get then() { throw new Error("no"); }, ok: "yes" }) },
    },
    { orchestrator: service.address },
  );
  const telemetry = await cycle(service.address);
  same.n = 3;
  assert.equal(telemetry.error, "");
  const part = (name: string) => telemetry.subsystems.find((part) => part.name === name)!;
  const output = (name: string) => JSON.parse(JSON.stringify(part(name).output));
  assert.equal(output("ZenGardenCore").fields.n.numberValue, 1);
  assert.equal(output("ZenGardenCore").fields.inner.structValue.fields.n.numberValue, 1);
  assert.equal(output("DreamBetCore").fields.value.listValue.values.length, 2);
  for (const name of ["SocialHubCore", "DreamShop"]) {
    assert.deepEqual(Object.keys(output(name).fields), ["ok"]);
    assert.deepEqual(part(name).issues.map(({ code }) => code), ["NOT_JSON"]);
  }
  assert.deepEqual(part("ZenGardenCore").issues, []);
  assert.match(part("SocialHubCore").issues[0]!.message, /big: a BigInt: give it as a string/);
  // A number is a double on both sides: it arrives unchanged, but it may not be exact.
  assert.equal(output("LiquidityEngine").fields.wei.numberValue, 10 ** 18);
  assert.match(part("LiquidityEngine").issues[0]!.message, /wei: over 2\^53, so not exact: give it as a string/);
});

test("the object itself is never sent, not even by another module", async () => {
  const keeper = { key: "secret", run() { return this; }, status() { return { wrapped: this }; } };
  const served = await serve(
    { NeuralMesh: keeper, CitadelCore: { run: ({ neuralMesh }: any) => ({ neuralMesh, ok: true }) } },
    { orchestrator: service.address },
  );
  const telemetry = await cycle(service.address);
  const shown = await subsystem(served.address)((client, callback) => client.getStatus({ subsystem: "NeuralMesh" }, callback));
  assert.doesNotMatch(JSON.stringify([telemetry, shown]), /secret/);
  assert.deepEqual(telemetry.subsystems.map(({ issues }) => issues.map(({ code }) => code)), [["NOT_JSON"], ["NOT_JSON"]]);
});

test("modules that are only read are never run, shown as such, and not counted as failed", async (t) => {
  t.mock.method(console, "error", () => {});
  let runs = 0;
  const keeper = { keys: 7, run() { runs += 1; }, status: () => ({ kept: 7 }) };
  let seen: any;
  await serve(
    { NeuralMesh: keeper, IdentityGrid: { status() { throw new Error("none"); } }, CitadelCore: { run(context: unknown) { seen = context; } } },
    { orchestrator: service.address, readOnly: ["NeuralMesh"] },
  );
  const telemetry = await cycle(service.address);
  assert.equal(telemetry.state, "CYCLE_STATE_SUCCEEDED");
  assert.equal(runs, 0);
  assert.equal(seen.neuralMesh, keeper);
  const [grid, mesh] = telemetry.subsystems;
  assert.equal(mesh!.issues[0]!.code, "READ_ONLY");
  assert.equal(mesh!.output!.fields!.kept!.numberValue, 7);
  assert.equal(grid!.issues[0]!.code, "READ_ONLY");
  await assert.rejects(serve({}, { readOnly: ["Nobody"] }), /readOnly names Nobody/);
});

test("classes and factories are made once", async () => {
  let made = 0;
  class Mesh {
    runs = 0;
    constructor() { made += 1; }
    run() { return { runs: ++this.runs }; }
  }
  const served = await serve({
    NeuralMesh: Mesh,
    ZenGardenCore: () => new Mesh(),
    DreamBetCore: async () => new Mesh(),
  });
  for (const name of ["NeuralMesh", "ZenGardenCore", "DreamBetCore"]) {
    await call(served.address, name, 1);
    const { output } = await call(served.address, name, 2);
    assert.equal(output!.fields!.runs!.numberValue, 2);
  }
  assert.equal(made, 3);
});

test("a repeated call gets the first answer, even while the first one is in progress, and if it was an error", async (t) => {
  t.mock.method(console, "error", () => {});
  let runs = 0;
  let started!: () => void;
  const atWork = new Promise<void>((resolve) => (started = resolve));
  let finish!: (value: unknown) => void;
  const served = await serve({
    NeuralMesh: { run: () => {
      runs++;
      started();
      return new Promise((resolve) => (finish = resolve));
    } },
    ZenGardenCore: { run: () => { throw new Error(`run ${++runs}`); } },
  });
  const first = call(served.address, "NeuralMesh", 1);
  await atWork;
  const second = call(served.address, "NeuralMesh", 1, { attempt: 2 });
  // It does not run concurrently with itself, and answers that the call may be repeated.
  await assert.rejects(call(served.address, "NeuralMesh", 2), { code: status.UNAVAILABLE });
  finish({ n: 1 });
  assert.deepEqual(await second, await first);
  assert.deepEqual(await call(served.address, "NeuralMesh", 1), await first);
  assert.equal(runs, 1);
  await assert.rejects(call(served.address, "ZenGardenCore", 1), /run 2/);
  await assert.rejects(call(served.address, "ZenGardenCore", 1), /run 2/);
});

/** Starts a call of `RunCycle`, which can be cancelled. */
function abandoned(address: string, name: string) {
  let giveUp!: () => void;
  const ended = subsystem(address)((client, callback) => {
    const calling = client.runCycle({ subsystem: name, cycleId: 1 }, callback);
    giveUp = () => calling.cancel();
  });
  return { ended, giveUp };
}

test("a cancelled call ends, notifies the module, and delays no other call", async () => {
  let start!: () => void;
  let tell!: () => void;
  const started = new Promise<void>((resolve) => (start = resolve));
  const told = new Promise<void>((resolve) => (tell = resolve));
  const served = await serve({
    NeuralMesh: {
      run: (_context: unknown, { signal }: Cycle) => {
        start();
        return new Promise(() => signal.addEventListener("abort", tell));
      },
    },
    ZenGardenCore: { run() {} },
  });
  const { ended, giveUp } = abandoned(served.address, "NeuralMesh");
  await started;
  await call(served.address, "ZenGardenCore", 1);
  giveUp();
  await assert.rejects(ended, { code: status.CANCELLED });
  await told;
});

test("a module that ends with its cancelled call is run again when the call is repeated", async () => {
  let runs = 0;
  let start!: () => void;
  const started = new Promise<void>((resolve) => (start = resolve));
  const served = await serve({
    NeuralMesh: {
      run(_context: unknown, { signal }: Cycle) {
        if (++runs > 1) return { runs };
        start();
        return new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
      },
    },
  });
  const { ended, giveUp } = abandoned(served.address, "NeuralMesh");
  await started;
  // This one waits for the first, and is not cancelled with it.
  const second = call(served.address, "NeuralMesh", 1, { epoch: 0, attempt: 2 });
  giveUp();
  await assert.rejects(ended, { code: status.CANCELLED });
  assert.equal((await second).output!.fields!.runs!.numberValue, 2);
  assert.deepEqual(await call(served.address, "NeuralMesh", 1, { epoch: 0 }), await second);
});

test("a superseded epoch is refused, an unknown name is not found, and health is served", async () => {
  const served = await serve({ NeuralMesh: { run() {} } });
  const initialize = (subsystem_: string, epoch: number) =>
    subsystem(served.address)((client, callback) => client.initialize({ subsystem: subsystem_, epoch }, callback));
  await initialize("NeuralMesh", 5);
  await initialize("NeuralMesh", 5);
  await assert.rejects(initialize("NeuralMesh", 4), { code: status.ABORTED });
  await assert.rejects(call(served.address, "NeuralMesh", 1, { epoch: 4 }), { code: status.ABORTED });
  await call(served.address, "NeuralMesh", 1, { epoch: 6 });
  await assert.rejects(initialize("NeuralMesh", 5), { code: status.ABORTED });
  await assert.rejects(call(served.address, "Nobody", 1), { code: status.NOT_FOUND });
  await assert.rejects(
    subsystem(served.address)((client, callback) => client.getStatus({ subsystem: "NeuralMesh" }, callback)),
    { code: status.UNIMPLEMENTED },
  );
  const health = await subsystem(served.address)((client, callback) =>
    client.makeUnaryRequest("/grpc.health.v1.Health/Check", () => Buffer.alloc(0), (bytes: Buffer) => bytes, {}, callback),
  );
  assert.deepEqual([...(health as Buffer)], [8, 1], "SERVING");
});

test("an interval loop runs until it is stopped", async () => {
  let ran!: () => void;
  const twice = new Promise<void>((resolve) => (ran = resolve));
  let runs = 0;
  const context = familiar({ NeuralMesh: { run: () => void (++runs === 2 && ran()) } });
  const loop = loopOf(context, 20, { orchestrator: service.address });
  await twice;
  await loop.stop();
  const { loops } = await orchestrator(service.address)((client, callback) => client.listIntervalLoops({}, callback));
  assert.deepEqual(loops, []);
});

test("clearInterval stops an interval loop, but not one that was started after it", async () => {
  const context = familiar({ NeuralMesh: { run() {} } });
  const options = { orchestrator: service.address };
  const intervals = async (): Promise<number[]> => {
    const { loops } = await orchestrator(service.address)((client, callback) => client.listIntervalLoops({}, callback));
    return loops.map(({ loop }: any) => loop.interval.seconds);
  };
  const first: NodeJS.Timeout = loopOf(context, 5000, options);
  clearInterval(first);
  const second = loopOf(context, 6000, options);
  await second.started;
  const other = loopOf(context, 7000, { ...options, loop: "other" });
  await other.started;
  assert.deepEqual(await intervals(), [6, 7]);
  clearInterval(other);
  // By then the first handle has taken effect as well.
  while ((await intervals()).length > 1);
  assert.deepEqual(await intervals(), [6]);
  await second.stop();
  assert.deepEqual(await intervals(), []);
});

test("errors at the start are reported", async (t) => {
  const nobody = { orchestrator: "127.0.0.1:1", waitSeconds: 0 };
  const unreachable = /the orchestrator at 127\.0\.0\.1:1 can't be reached.*UNAVAILABLE.*ECONNREFUSED/;
  await assert.rejects(runSingleCycle({ NeuralMesh: { run() {} } }, nobody), unreachable);
  await assert.rejects(getStatus(nobody), unreachable);
  const error = t.mock.method(console, "error", () => {});
  const loop = startIntervalLoop({ NeuralMesh: { run() {} } }, 5000, nobody);
  await assert.rejects(loop.started, unreachable);
  assert.match(String(error.mock.calls[0]?.arguments[0]), /the loop dreamnet was not started: .*UNAVAILABLE/);
});

test("calls wait until the orchestrator is up", async () => {
  const place = await nobodyThere();
  const options = { orchestrator: place.address };
  const context = familiar({ NeuralMesh: { run: () => ({ value: 1 }) } });
  const [ran, status, loop] = [runSingleCycle(context, options), getStatus(options), loopOf(context, 60_000, options)];
  await place.called;
  await place.leave();
  const late = await startOrchestrator(place.address);
  open.push(() => late.stop());
  assert.equal((await ran).error, undefined);
  assert.ok((await status).totalCycles <= 1);
  await loop.started;
  await loop.stop();
});

test("served modules are not served again with other options", async () => {
  const context = familiar({ FieldLayer: { run() {} } });
  const options = { orchestrator: service.address, leaseSeconds: 20 };
  await runSingleCycle(context, options);
  await runSingleCycle(context, { orchestrator: `http://${service.address}/` });
  await assert.rejects(runSingleCycle(context, { ...options, leaseSeconds: 10 }), /with another leaseSeconds/);
  await assert.rejects(runSingleCycle(context, { orchestrator: "127.0.0.1:1" }), /with another orchestrator/);
});

test("a lost registration is restored", async () => {
  let ran: () => void = () => {};
  const context = familiar({ NeuralMesh: { run: () => ran() } });
  const options = { orchestrator: service.address, leaseSeconds: 1 };
  await runSingleCycle(context, options);
  await orchestrator(service.address)((client, callback) => client.unregisterSubsystem({ name: "NeuralMesh" }, callback));
  const again = new Promise<void>((resolve) => (ran = resolve));
  const loop = loopOf(context, 20, options);
  await again;
  await loop.stop();
});

test("the stand-alone subsystem waits until the orchestrator is up", async () => {
  const place = await nobodyThere();
  const starting = startSubsystem("--name", "total", "--orchestrator", place.address);
  await place.called;
  await place.leave();
  const late = await startOrchestrator(place.address);
  open.push(() => late.stop());
  const total = await starting;
  assert.equal((await cycle(late.address)).subsystems[0]!.state, "SUBSYSTEM_STATE_SUCCEEDED");
  assert.equal(await total.stop(), 0);
});

test("the stand-alone subsystem adds up its inputs", async () => {
  const mesh = await serve({ NeuralMesh: { run: () => ({ value: 41 }) } }, { orchestrator: service.address });
  const total = await startSubsystem("--name", "total", "--orchestrator", service.address, "--after", "NeuralMesh", "--reads", "nobody");
  const part = (await cycle(service.address)).subsystems.find(({ name }) => name === "total")!;
  assert.equal(part.output!.fields!.value!.numberValue, 42);
  assert.deepEqual(part.metrics, { cycles: 1 });
  assert.deepEqual(part.issues.map(({ code }) => code), ["NO_VALUE"]);
  assert.equal(await total.stop(), 0);
  const names = async () =>
    (await orchestrator(service.address)((client, callback) => client.listSubsystems({}, callback))).subsystems.map(
      ({ registration }: any) => registration.name,
    );
  assert.deepEqual(await names(), ["NeuralMesh"]);
  await mesh.stop();
  assert.deepEqual(await names(), []);
});

test("the stand-alone subsystem says in a line what is wrong", async () => {
  const taken = service.address;
  for (const [args, code, said] of [
    [["--help"], 0, /^usage: [\s\S]*--listen HOST:PORT/],
    [["--lisen", "127.0.0.1:0"], 2, /^Unknown option '--lisen'/],
    [["--listen", "nope"], 1, /^listen is 'nope': give a string, "HOST:PORT"\n$/],
    [["--listen", taken], 1, new RegExp(`can't listen on ${taken}: .*EADDRINUSE.*\n$`)],
    [["--listen", "127.0.0.1:0", "--name", "x y", "--orchestrator", taken], 1, /^the orchestrator at .* answered INVALID_ARGUMENT: .*"x y".*\n$/],
  ] as const) {
    const { code: ended, output } = await runSubsystem(...args);
    assert.equal(ended, code, output);
    assert.match(output, said);
    assert.doesNotMatch(output, /\n +at /);
  }
});

test("modules that are no longer served are served until the running cycle has ended", async () => {
  let began!: () => void;
  const running = new Promise<void>((resolve) => (began = resolve));
  let proceed!: () => void;
  const told = new Promise<void>((resolve) => (proceed = resolve));
  const first = {
    run: () => {
      began();
      return told;
    },
  };
  const second = { run: () => ({ ran: true }) };
  const served = await serve({ first, second }, { orchestrator: service.address, registrations: { second: { requires: ["first"] } } });
  const record = cycle(service.address);
  await running;
  const stopped = served.stop();
  await unregistered(service.address, "second");
  proceed();
  assert.equal((await record).state, "CYCLE_STATE_SUCCEEDED");
  await stopped;
});

/** Waits until a subsystem is no longer registered. */
async function unregistered(address: string, name: string): Promise<void> {
  for (;;) {
    const { subsystems } = await orchestrator(address)((client, callback) => client.listSubsystems({}, callback));
    if (!subsystems.some(({ registration }: any) => registration.name === name)) return;
  }
}
