// DreamNet's modules as subsystems, against the real service.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { status } from "@grpc/grpc-js";
import {
  getStatus,
  OrchestratorCore,
  READ_ONLY,
  runSingleCycle,
  serveSubsystems,
  startIntervalLoop,
  stopServing,
  type Cycle,
  type IntervalLoop,
  type OrchestratorContext,
  type RegistrationOptions,
  type Servable,
} from "dreamnet-modules";
import { Fleet } from "dreamnet-subsystem";
import { contextKey, TOPOLOGY } from "../../dreamnet/dist/topology.js";
import type { RunCycleRequest } from "../../subsystem/dist/gen/dreamnet/subsystem/v1/RunCycleRequest.js";
import {
  atEnd,
  Caller,
  cycle,
  event,
  nobodyThere,
  orchestrator,
  serving,
  startOrchestrator,
  untilRegistry,
  type Running,
} from "./support.js";

const NAMES = Object.keys(TOPOLOGY) as Array<keyof typeof TOPOLOGY>;
const inputsOf = ({ requires = [], after = [], reads = [] }: RegistrationOptions) =>
  new Set([...requires, ...after, ...reads]);

let service: Running;
before(async () => {
  service = await startOrchestrator();
});
after(async () => assert.equal(await service.stop(), 0));
const at = () => `http://${service.address}`;

const serve = async (...args: Parameters<typeof serveSubsystems>) => {
  const served = await serveSubsystems(...args);
  atEnd(() => served.stop());
  return served;
};
const familiar = <C extends object>(context: C): C => {
  atEnd(() => stopServing(context as OrchestratorContext));
  return context;
};

const loopOf = (...args: Parameters<typeof startIntervalLoop>): IntervalLoop => {
  const loop = startIntervalLoop(...args);
  atEnd(() => loop.stop());
  return loop;
};

/** Calls `RunCycle` of a module as the orchestrator does. */
const call = (address: string, name: string, cycleId: number, more: RunCycleRequest = {}) =>
  new Caller(address).runCycle(cycleId, { subsystem: name, ...more });

// A copy of this folder does not have this file.
const TOML = new URL("../../../../examples/dreamnet.toml", import.meta.url);

test("the topology is that of examples/dreamnet.toml", { skip: !existsSync(TOML) }, async () => {
  const toml = await readFile(TOML, "utf8");
  const declared = toml
    .split("[[subsystems]]")
    .slice(1)
    .map((text) => {
      const list = (key: string) =>
        [...(text.match(new RegExp(`^${key} = \\[([^\\]]*)\\]`, "m"))?.[1] ?? "").matchAll(/"(\w+)"/g)].map(
          (m) => m[1],
        );
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
          const { phase, after } = TOPOLOGY[name] as RegistrationOptions;
          const before = NAMES.filter((other) => (TOPOLOGY[other].phase ?? 0) < phase!);
          for (const other of [...before, ...after!]) assert.ok(ended.has(other), `${name} ran before ${other}`);
          assert.deepEqual(new Set(Object.keys(context)), new Set([...inputsOf(TOPOLOGY[name])].map(contextKey)));
          await new Promise((resolve) => setImmediate(resolve));
          ended.add(name);
        },
      },
    ]),
  );
  await serve(objects, { orchestrator: at(), sequential: false, run: READ_ONLY });
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
  await serve(objects, { orchestrator: at() });
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
  await serve({ ZenGardenCore: { run }, DreamBetCore: { run } }, { orchestrator: at() });
  await cycle(service.address);
  assert.deepEqual(seen, [[], []]);
});

test("a subsystem of another kind is represented by its latest output, frozen", async () => {
  let seen: any;
  const sensor = new Fleet({ orchestrator: at(), log: () => {} });
  sensor.subsystem("sensor", () => ({ nodes: [{ id: 1 }] }));
  await serving(sensor);
  await untilRegistry(service.address, (all) => "sensor" in all);
  const registrations = { CitadelCore: { after: ["sensor"], reads: ["nobody"] } };
  await serve(
    {
      CitadelCore: {
        run(context: unknown) {
          seen = context;
        },
      },
    },
    { orchestrator: at(), registrations },
  );
  const { subsystems } = await cycle(service.address);
  assert.equal(JSON.stringify(seen), '{"sensor":{"nodes":[{"id":1}]}}');
  assert.throws(() => {
    seen.sensor.nodes[0].id = 2;
  }, TypeError);
  // The record says so, and that nobody serves the other one.
  const citadel = subsystems.find(({ name }) => name === "CitadelCore");
  assert.deepEqual(
    citadel!.issues.map(({ code, severity }) => `${code} ${severity}`),
    ["NOT_SERVED SEVERITY_WARNING", "NO_METHODS SEVERITY_INFO"],
  );
  assert.match(citadel!.issues[0]!.message, /^no process serves nobody$/);
  assert.match(citadel!.issues[1]!.message, /^only the output of sensor can be had: http:.* answered UNIMPLEMENTED/);
});

test("Citadel is represented by the result of its run, and a module outside of the 28 can be an input too", async () => {
  let seen: any;
  const agents = [{ id: "wolf" }];
  await serve(
    {
      CitadelCore: { run: async () => ({ snapshot: { plan: "grow" } }) },
      LatentCollaboration: {
        run(context: unknown) {
          seen = context;
        },
      },
      agents,
    },
    { orchestrator: at(), registrations: { LatentCollaboration: { reads: ["agents"] } } },
  );
  await cycle(service.address);
  assert.deepEqual(Object.keys(seen).sort(), ["agents", "citadelSnapshot"]);
  assert.equal(JSON.stringify(seen.citadelSnapshot), '{"snapshot":{"plan":"grow"}}');
  assert.throws(() => {
    seen.citadelSnapshot.snapshot.plan = "shrink";
  }, TypeError);
  assert.equal(seen.agents, agents);
});

test("given fields are registered, and the other ones are as in the table", async () => {
  const context = familiar({
    NeuralMesh: { run: () => new Promise(() => {}) },
    CitadelCore: { run: () => ({ fine: true }) },
    FieldLayer: { run: () => ({ fine: true }) },
  });
  const telemetry = await runSingleCycle(context, {
    orchestrator: at(),
    grace: "100ms",
    registrations: {
      NeuralMesh: { timeout: "50ms", critical: true },
      FieldLayer: { requires: ["NeuralMesh"], reads: [] },
    },
  });
  assert.match(telemetry.error!, /NeuralMesh/);
  const { subsystems } = await orchestrator(service.address).call("ListSubsystems", {});
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
    { orchestrator: at(), registrations: { last: { after: ["middle"] }, middle: { requires: ["first"] } } },
  );
  assert.equal((await cycle(service.address)).state, "CYCLE_STATE_SUCCEEDED");
  assert.deepEqual(order, ["first", "middle", "last"]);
});

test("if one registration is refused, none stays registered", async () => {
  const objects = { fine: { run() {} }, "no name!": { run() {} } };
  await assert.rejects(
    serve(objects, { orchestrator: at() }),
    /subsystem no name!: its name is 'no name!'; give 1 to 63 letters/,
  );
  const { subsystems } = await orchestrator(service.address).call("ListSubsystems", {});
  assert.deepEqual(subsystems, []);
});

test("a module that throws fails only its own subsystem", async (t) => {
  t.mock.method(console, "error", () => {});
  const throwing = (thrown: unknown): Servable => ({
    run() {
      throw thrown;
    },
  });
  await serve(
    {
      ZenGardenCore: throwing(new Error("boom ".repeat(10_000))),
      DreamBetCore: throwing(undefined),
      NeuralMesh: { run: () => Promise.reject(Object.create(null)) },
      SocialHubCore: {
        run: () => ({
          // biome-ignore lint/suspicious/noThenProperty: what a foreign module may return
          then() {
            throw new RangeError("late");
          },
        }),
      },
      CitadelCore: { run: () => ({ fine: true }) },
    },
    { orchestrator: at() },
  );
  const telemetry = await cycle(service.address);
  const states = Object.fromEntries(
    telemetry.subsystems.map(({ name, state, errorCode }) => [name, `${state} ${errorCode}`]),
  );
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
  function grow() {
    throw new TypeError("nothing grows", { cause });
  }
  const served = await serve(
    {
      ZenGardenCore: {
        async run() {
          await null;
          grow();
        },
        status: () => grow(),
      },
      DreamBetCore: {
        run() {
          throw "a text";
        },
      },
      SocialHubCore: {
        run: () => new Promise((_, reject) => reject(Object.defineProperty(new Error("odd"), "stack", { get: grow }))),
      },
      WolfPack: { status: () => grow() },
    },
    { orchestrator: at() },
  );
  const { subsystems } = await cycle(service.address);
  const part = (name: string) => subsystems.find((part) => part.name === name)!;
  const place = /^TypeError: nothing grows, at grow \(file:\/\/\/.*modules\.test\.js:\d+:\d+\)$/;
  assert.match(part("ZenGardenCore").errorMessage, place);
  assert.equal(part("DreamBetCore").errorMessage, "a text");
  assert.equal(part("SocialHubCore").errorMessage, "Error: odd");
  assert.match(part("WolfPack").issues.find(({ code }) => code === "NO_STATUS")!.message, place);
  const garden = logged().find((line) => line.startsWith("ZenGardenCore failed in cycle "));
  assert.match(garden!, /TypeError: nothing grows\n +at grow .*\n +at .*run [\s\S]*no such seed/);
  for (const name of ["DreamBetCore failed", "SocialHubCore failed", "WolfPack has no status"]) {
    assert.ok(
      logged().some((line) => line.startsWith(`${name} in cycle `)),
      name,
    );
  }
  // A repeated call gets the same answer, without another log entry.
  const lines = logged().length;
  const again = { cycleId: (await getStatus({ orchestrator: at() })).lastCycle!.cycleId, epoch: 2 ** 50 };
  await assert.rejects(call(served.address, "DreamBetCore", again.cycleId, again), /a text/);
  await assert.rejects(call(served.address, "DreamBetCore", again.cycleId, again), /a text/);
  assert.equal(logged().length, lines + 1);
  await assert.rejects(
    new Caller(served.address).call("GetStatus", { subsystem: "ZenGardenCore" }),
    /nothing grows, at grow/,
  );
  assert.match(logged().at(-1)!, /^ZenGardenCore has no status: TypeError: nothing grows\n/);
});

test("odd outputs: an object that is mutated later, an array, nothing, and values that JSON can't represent", async () => {
  const same = { n: 0, inner: { n: 0 } };
  await serve(
    {
      ZenGardenCore: {
        run() {
          same.n = same.inner.n = 1;
          queueMicrotask(() => {
            same.n = same.inner.n = 2;
          });
          return same;
        },
      },
      DreamBetCore: { run: async () => [1, undefined] },
      NeuralMesh: { run() {} },
      SocialHubCore: { run: () => ({ f() {}, big: 2n ** 60n, nan: NaN, ok: "yes" }) },
      LiquidityEngine: { run: () => ({ wei: 10 ** 18 }) },
      DreamShop: {
        run: () => ({
          // biome-ignore lint/suspicious/noThenProperty: what a foreign module may return
          get then() {
            throw new Error("no");
          },
          ok: "yes",
        }),
      },
    },
    { orchestrator: at() },
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
    assert.ok(part(name).issues.some(({ code }) => code === "NOT_JSON"));
  }
  const left = (name: string) => part(name).issues.find(({ code }) => code === "NOT_JSON")?.message;
  assert.equal(left("ZenGardenCore"), undefined);
  assert.match(left("SocialHubCore")!, /big: a BigInt: give it as a string/);
  // A number is a double on both sides: it arrives unchanged, but it may not be exact.
  assert.equal(output("LiquidityEngine").fields.wei.numberValue, 10 ** 18);
  assert.match(left("LiquidityEngine")!, /wei: over 2\^53, so not exact: give it as a string/);
});

test("the object itself is never sent, not even by another module", async () => {
  const keeper = {
    key: "secret",
    run() {
      return this;
    },
    status() {
      return { wrapped: this };
    },
  };
  const served = await serve(
    { NeuralMesh: keeper, CitadelCore: { run: ({ neuralMesh }: any) => ({ neuralMesh, ok: true }) } },
    { orchestrator: at() },
  );
  const telemetry = await cycle(service.address);
  const shown = await new Caller(served.address).call("GetStatus", { subsystem: "NeuralMesh" });
  assert.doesNotMatch(JSON.stringify([telemetry, shown]), /secret/);
  assert.deepEqual(
    telemetry.subsystems.map(({ issues }) => issues.map(({ code }) => code)),
    [["NOT_JSON"], ["NOT_JSON"]],
  );
});

test("modules that are only read are never run, shown as such, and not counted as failed", async (t) => {
  t.mock.method(console, "error", () => {});
  let runs = 0;
  const keeper = {
    keys: 7,
    run() {
      runs += 1;
    },
    status: () => ({ kept: 7 }),
  };
  let seen: any;
  await serve(
    {
      NeuralMesh: keeper,
      IdentityGrid: {
        status() {
          throw new Error("none");
        },
      },
      CitadelCore: {
        run(context: unknown) {
          seen = context;
        },
      },
    },
    { orchestrator: at(), readOnly: ["NeuralMesh"] },
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
    constructor() {
      made += 1;
    }
    run() {
      return { runs: ++this.runs };
    }
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
    NeuralMesh: {
      run: () => {
        runs++;
        started();
        return new Promise((resolve) => (finish = resolve));
      },
    },
    ZenGardenCore: {
      run: () => {
        throw new Error(`run ${++runs}`);
      },
    },
  });
  const first = call(served.address, "NeuralMesh", 1);
  await atWork;
  const second = call(served.address, "NeuralMesh", 1, { attempt: 2 });
  finish({ n: 1 });
  assert.deepEqual(await second, await first);
  assert.deepEqual(await call(served.address, "NeuralMesh", 1), await first);
  assert.equal(runs, 1);
  await assert.rejects(call(served.address, "ZenGardenCore", 1), /run 2/);
  await assert.rejects(call(served.address, "ZenGardenCore", 1), /run 2/);
});

/** Starts a call of `RunCycle`, which can be cancelled. */
function abandoned(address: string, name: string) {
  const ended = call(address, name, 1);
  return { ended, giveUp: () => ended.cancel() };
}

test("a cancelled call ends, notifies the module, and delays no other call", async () => {
  let start!: () => void;
  let tell!: () => void;
  const started = new Promise<void>((resolve) => (start = resolve));
  const told = new Promise<void>((resolve) => (tell = resolve));
  const served = await serve(
    {
      NeuralMesh: {
        run: (_context: unknown, { signal }: Cycle) => {
          start();
          return new Promise(() => signal.addEventListener("abort", tell));
        },
      },
      ZenGardenCore: { run() {} },
    },
    { grace: "100ms" },
  );
  const { ended, giveUp } = abandoned(served.address, "NeuralMesh");
  await started;
  await call(served.address, "ZenGardenCore", 1);
  giveUp();
  await assert.rejects(ended, { code: status.CANCELLED });
  await told;
});

test("a module that ends with its cancelled call is run again when the call is repeated", async () => {
  let runs = 0;
  const [started, ended] = [event(), event()];
  const served = await serve({
    NeuralMesh: {
      run(_context: unknown, { signal }: Cycle) {
        if (++runs > 1) return { runs };
        started.happen();
        const aborted = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
        return aborted.finally(ended.happen);
      },
    },
  });
  const first = abandoned(served.address, "NeuralMesh");
  await started.happened;
  first.giveUp();
  await assert.rejects(first.ended, { code: status.CANCELLED });
  await ended.happened;
  const second = await call(served.address, "NeuralMesh", 1, { attempt: 2 });
  assert.equal(second.output!.fields!.runs!.numberValue, 2);
  assert.deepEqual(await call(served.address, "NeuralMesh", 1), second);
});

test("a superseded epoch is refused, an unknown name is not found, and health is served", async () => {
  const served = await serve({ NeuralMesh: { run() {} } });
  const initialize = (subsystem_: string, epoch: number) =>
    new Caller(served.address).call("Initialize", { subsystem: subsystem_, epoch });
  await initialize("NeuralMesh", 5);
  await initialize("NeuralMesh", 5);
  await assert.rejects(initialize("NeuralMesh", 4), { code: status.ABORTED });
  await assert.rejects(call(served.address, "NeuralMesh", 1, { epoch: 4 }), { code: status.ABORTED });
  await call(served.address, "NeuralMesh", 1, { epoch: 6 });
  await assert.rejects(initialize("NeuralMesh", 5), { code: status.ABORTED });
  await assert.rejects(call(served.address, "Nobody", 1), { code: status.NOT_FOUND });
  await assert.rejects(new Caller(served.address).call("GetStatus", { subsystem: "NeuralMesh" }), {
    code: status.UNIMPLEMENTED,
  });
  assert.equal(await new Caller(served.address).health(), 1, "SERVING");
});

test("a module that blocks its thread costs neither its lease nor its health", async (t) => {
  const error = t.mock.method(console, "error", () => {});
  const block = () => void Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2500);
  await serve({ FieldLayer: { run: block } }, { orchestrator: at(), lease: "1s" });
  assert.equal((await cycle(service.address)).state, "CYCLE_STATE_SUCCEEDED");
  assert.equal((await cycle(service.address)).state, "CYCLE_STATE_SUCCEEDED");
  assert.deepEqual(error.mock.calls, []);
});

test("without an orchestrator of its own, a process says that it can't find the others", async () => {
  const served = await serve({ LatentCollaboration: { run() {} } });
  const inputs = { NeuralMesh: {}, AgentWalletManager: {}, CitadelCore: {} };
  const { issues } = await call(served.address, "LatentCollaboration", 1, { inputs });
  const why = "its process can't be found without the option orchestrator";
  const message = `only the output of NeuralMesh, AgentWalletManager can be had: ${why}`;
  assert.deepEqual(
    issues.map((it) => `${it.code}: ${it.message}`),
    [`NO_METHODS: ${message}`],
  );
});

test("an interval loop runs until it is stopped", async () => {
  let ran!: () => void;
  const twice = new Promise<void>((resolve) => (ran = resolve));
  let runs = 0;
  const context = familiar({ NeuralMesh: { run: () => void (++runs === 2 && ran()) } });
  const loop = loopOf(context, 20, { orchestrator: at() });
  await twice;
  await loop.stop();
  const { loops } = await orchestrator(service.address).call("ListIntervalLoops", {});
  assert.deepEqual(loops, []);
});

test("clearInterval stops an interval loop, but not one that was started after it", async () => {
  const context = familiar({ NeuralMesh: { run() {} } });
  const options = { orchestrator: at() };
  const intervals = async (): Promise<number[]> => {
    const { loops } = await orchestrator(service.address).call("ListIntervalLoops", {});
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
  const nobody = { orchestrator: "http://127.0.0.1:1", wait: "0s" };
  const unreachable = /the orchestrator at http:\/\/127\.0\.0\.1:1 can't be reached.*UNAVAILABLE.*ECONNREFUSED/;
  await assert.rejects(runSingleCycle({ NeuralMesh: { run() {} } }, nobody), unreachable);
  await assert.rejects(getStatus(nobody), unreachable);
  const error = t.mock.method(console, "error", () => {});
  const loop = startIntervalLoop({ NeuralMesh: { run() {} } }, 5000, nobody);
  await assert.rejects(loop.started, unreachable);
  const said = error.mock.calls.map((call) => String(call.arguments[0]));
  assert.ok(
    said.some((line) => /^the loop dreamnet was not started: .*UNAVAILABLE/.test(line)),
    said.join("\n"),
  );
});

test("calls wait until the orchestrator is up", async () => {
  const place = await nobodyThere();
  const options = { orchestrator: `http://${place.address}` };
  const context = familiar({ NeuralMesh: { run: () => ({ value: 1 }) } });
  const [ran, status, loop] = [runSingleCycle(context, options), getStatus(options), loopOf(context, 60_000, options)];
  await place.called;
  await place.leave();
  const late = await startOrchestrator(place.address);
  atEnd(() => late.stop());
  assert.equal((await ran).error, undefined);
  assert.ok((await status).totalCycles <= 1);
  await loop.started;
  await loop.stop();
});

test("served modules are not served again with other options", async () => {
  const context = familiar({ FieldLayer: { run() {} } });
  const options = { orchestrator: at(), lease: "20s" };
  await runSingleCycle(context, options);
  await runSingleCycle(context, { orchestrator: service.address });
  await assert.rejects(runSingleCycle(context, { ...options, lease: "10s" }), /with another lease/);
  await assert.rejects(runSingleCycle(context, { orchestrator: "http://127.0.0.1:1" }), /with another orchestrator/);
});

test("a lost registration is restored", async () => {
  let ran: () => void = () => {};
  const context = familiar({ NeuralMesh: { run: () => ran() } });
  const options = { orchestrator: at(), lease: "1s" };
  await runSingleCycle(context, options);
  await orchestrator(service.address).call("UnregisterSubsystem", { name: "NeuralMesh" });
  const again = new Promise<void>((resolve) => (ran = resolve));
  const loop = loopOf(context, 20, options);
  await again;
  await loop.stop();
});

test("OrchestratorCore has a status at once, which is kept fresh", async () => {
  const other = await startOrchestrator();
  atEnd(() => other.stop());
  const context = familiar({
    NeuralMesh: {},
    CitadelCore: {
      run() {
        throw new Error("no seed");
      },
    },
    FieldLayer: { run() {} },
  });
  const options = { orchestrator: `http://${other.address}` };
  assert.deepEqual(OrchestratorCore.getStatus(options), { totalCycles: 0 });
  const telemetry = await OrchestratorCore.runSingleCycle(context);
  assert.deepEqual(Object.keys(telemetry), ["cycleId", "startedAt", "finishedAt", "durationMs", "error"]);
  const { cycleId, startedAt, finishedAt, durationMs, error } = telemetry;
  for (const whole of [cycleId, startedAt, finishedAt, durationMs]) assert.ok(Number.isInteger(whole), String(whole));
  assert.equal(finishedAt - startedAt, durationMs);
  assert.match(error!, /CitadelCore INTERNAL: Error: no seed/);
  assert.deepEqual(OrchestratorCore.getStatus(), { lastCycle: telemetry, totalCycles: 1 });
  // A cycle that others run is known soon.
  await cycle(other.address);
  while (OrchestratorCore.getStatus().totalCycles === 1) await new Promise((resolve) => setImmediate(resolve));
  const loop = OrchestratorCore.startIntervalLoop(context, 20);
  await loop.started;
  while (OrchestratorCore.getStatus().totalCycles < 5) await new Promise((resolve) => setImmediate(resolve));
  await loop.stop();
});
