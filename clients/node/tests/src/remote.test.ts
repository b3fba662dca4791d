// Modules call the methods of modules in other processes, synchronously, as in one process.
//
// Each `serve` here is a process of its own for the others: they meet over the network, though their modules share a
// thread. `original.test.ts` has real processes.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { once } from "node:events";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { before, after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { serialize } from "node:v8";
import { Client, credentials, status, type ServiceError } from "@grpc/grpc-js";
import { serveSubsystems, type ServeOptions } from "dreamnet-modules";
import { MODULES } from "../../dreamnet/dist/contract.js";
import {
  atEnd,
  cycle,
  event,
  orchestrator,
  PROGRAM,
  registered,
  run,
  start,
  startOrchestrator,
  type Running,
} from "./support.js";

let service: Running;
before(async () => {
  service = await startOrchestrator();
});
after(async () => assert.equal(await service.stop(), 0));

const serve = async (objects: Record<string, object>, options: ServeOptions = {}) => {
  const served = await serveSubsystems(objects, { orchestrator: `http://${service.address}`, ...options });
  atEnd(() => served.stop());
  return served;
};

/** Runs one cycle with a module in another process than `mesh`, which is what it gets as `neuralMesh`. */
async function using(mesh: object, use: (neuralMesh: any, context: any) => unknown, options: ServeOptions = {}) {
  await serve({ NeuralMesh: mesh });
  let problem: unknown;
  const CitadelCore = {
    async run(context: any) {
      try {
        await use(context.neuralMesh, context);
      } catch (error) {
        problem = error;
      }
    },
  };
  await serve({ CitadelCore }, options);
  const { state, error } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED", error);
  if (problem) throw problem;
}

test("a module of another process has exactly the methods and properties of its owner", async () => {
  class Keeper {
    inherited() {
      return "inherited";
    }
    get computed() {
      return this.memories.length;
    }
    memories = ["a"];
  }
  class Mesh extends Keeper {
    own = () => "own";
    level = 0.5;
    #secret = 1;
    reveal() {
      return this.#secret;
    }
  }
  const mesh = new Mesh();
  await using(mesh, (remote) => {
    assert.notEqual(remote, mesh);
    assert.deepEqual(Object.keys(remote), Object.keys(mesh));
    assert.ok("inherited" in remote && "reveal" in remote && "level" in remote && !("forget" in remote));
    assert.equal(typeof remote.inherited, "function");
    assert.equal(remote.inherited(), "inherited");
    assert.equal(remote.own(), "own");
    assert.equal(remote.reveal(), 1);
    // Properties are read when they are used.
    assert.equal(remote.level, 0.5);
    mesh.level = 0.75;
    mesh.memories.push("b");
    assert.equal(remote.level, 0.75);
    assert.deepEqual([remote.memories, remote.computed], [["a", "b"], 2]);
    // As for any object: what is not there is undefined, and can't be called.
    assert.equal(remote.forget?.(), undefined);
    assert.throws(() => remote.forget(), { name: "TypeError", message: /remote\.forget is not a function/ });
    assert.throws(() => (remote.level = 1), {
      name: "TypeError",
      message: /NeuralMesh\.level can't be set: NeuralMesh is in another process/,
    });
    assert.throws(() => (remote.note = 1), TypeError);
    assert.throws(() => (remote.own = () => ""), TypeError);
  });
});

test("arguments and results are copied when they are given, and keep what a structured clone keeps", async () => {
  const kept: any[] = [];
  const state = { n: 1 };
  const mesh = {
    keep: (...given: any[]) => void kept.push(...given),
    echo: (value: unknown) => value,
    list: () => state,
    sum: (...numbers: number[]) => numbers.reduce((sum, n) => sum + n, 0),
  };
  await using(mesh, (remote) => {
    const sample = { at: { x: 1 } };
    assert.equal(remote.keep(sample, undefined), undefined);
    sample.at.x = 2;
    assert.deepEqual(kept, [{ at: { x: 1 } }, undefined]);
    const before = remote.list();
    state.n = 2;
    before.n = 3;
    assert.deepEqual([before, remote.list(), state], [{ n: 3 }, { n: 2 }, { n: 2 }]);
    assert.equal(remote.sum(0.1, 0.2, 0.3), 0.1 + 0.2 + 0.3);
    const ring: any = {
      // biome-ignore lint/suspicious/noSparseArray: a hole is kept
      list: [1, , 3],
      map: new Map([[{ a: 1 }, new Set([1n])]]),
      at: new Date(7),
      nan: Number.NaN,
      zero: -0,
    };
    ring.ring = ring;
    ring.bytes = new Uint8Array([1, 2]);
    ring.nothing = undefined;
    assert.deepStrictEqual(remote.echo(ring), ring);
    assert.deepStrictEqual(remote.echo(), undefined);
    class Point {
      x = 1;
      double = 2;
    }
    assert.deepStrictEqual(remote.echo(new Point()), { x: 1, double: 2 });
  });
});

test("modules cross as references, at any depth", async () => {
  const mesh = {
    self() {
      return { mesh: this, list: [this] };
    },
    callBack: ({ module }: any) => module.answer(),
    isItself(value: unknown) {
      return value === this;
    },
  };
  await serve({ NeuralMesh: mesh });
  const seen: any = {};
  const CitadelCore = {
    answer: () => 42,
    run({ neuralMesh }: any) {
      const { mesh, list } = neuralMesh.self();
      seen.same = mesh === neuralMesh && list[0] === neuralMesh;
      // It is called while it waits for the answer.
      seen.answer = neuralMesh.callBack({ module: CitadelCore });
      seen.live = neuralMesh.isItself(neuralMesh);
      seen.copy = neuralMesh.isItself({});
    },
  };
  await serve({ CitadelCore });
  const { state, error } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED", error);
  assert.deepEqual(seen, { same: true, answer: 42, live: true, copy: false });
});

test("what can't cross says so when it is called", async () => {
  const mesh = { subscribe() {}, reader: () => ({ read: () => 1 }), later: () => ({ done: Promise.resolve() }) };
  await using(mesh, (remote) => {
    const says = (call: () => unknown, message: string) =>
      assert.throws(call, { name: "TypeError", message: new RegExp(message) });
    says(
      () => remote.subscribe(1, { on: { change() {} } }),
      "^NeuralMesh\\.subscribe\\(\\): arguments\\[1\\]\\.on\\.change is a function, which can't be copied",
    );
    says(() => remote.subscribe(Symbol("s")), "arguments\\[0\\] is a symbol");
    says(() => remote.subscribe([new WeakMap()]), "arguments can't be copied to another process: .*WeakMap");
    says(() => remote.reader(), "the result of NeuralMesh\\.reader\\(\\)\\.read is a function");
    says(() => remote.later(), "the result of NeuralMesh\\.later\\(\\) can't be copied to another process: .*Promise");
  });
});

test("what a method throws arrives as it was thrown", async () => {
  const cause = new RangeError("no seed");
  const mesh = {
    range() {
      throw new RangeError("far");
    },
    coded() {
      throw Object.assign(new Error("busy", { cause }), { code: "EBUSY", socket: () => {} });
    },
    named() {
      throw Object.assign(new Error("poor"), { name: "Insolvent" });
    },
    text() {
      throw "a text";
    },
    odd() {
      throw () => {};
    },
  };
  await using(mesh, (remote) => {
    assert.throws(
      () => remote.range(),
      (error: Error) => {
        assert.ok(error instanceof RangeError);
        assert.match(error.stack!, /^RangeError: far\n +at .*range .*remote\.test\.js/);
        return true;
      },
    );
    assert.throws(
      () => remote.coded(),
      (error: any) => {
        assert.deepEqual(
          [error.message, error.code, error.cause.message, "socket" in error],
          ["busy", "EBUSY", "no seed", false],
        );
        return error.cause instanceof RangeError;
      },
    );
    assert.throws(() => remote.named(), { name: "Insolvent", message: "poor" });
    assert.throws(
      () => remote.text(),
      (error) => error === "a text",
    );
    assert.throws(
      () => remote.odd(),
      (error) => typeof error === "string",
    );
  });
});

test("a promise is a promise: it settles later, while both processes go on", async () => {
  const proceed = event();
  const mesh = {
    later: async (value: number) => {
      await proceed.happened;
      return value * 2;
    },
    never: async () => {
      throw new RangeError("not today");
    },
    proceed: () => proceed.happen(),
  };
  await using(mesh, async (remote) => {
    const both = [remote.later(1), remote.later(2)];
    assert.ok(both.every((promise) => promise instanceof Promise));
    await assert.rejects(remote.never(), { name: "RangeError", message: "not today" });
    remote.proceed();
    assert.deepEqual(await Promise.all(both), [2, 4]);
  });
});

test("a promise that settles while its caller waits for another call is still a promise", async () => {
  // The owner answers `both` while it calls back: its caller receives both outcomes of `later` meanwhile.
  const mesh = {
    both: (caller: any) => caller.later(),
    settled: async () => "settled",
    pass: () => "passed",
  };
  await serve({ NeuralMesh: mesh });
  const seen: any = {};
  let remote: any;
  const CitadelCore = {
    later() {
      seen.inner = remote.settled();
      for (let n = 0; n < 20; n++) seen.passed = remote.pass();
      return "later";
    },
    async run({ neuralMesh }: any) {
      remote = neuralMesh;
      seen.outer = neuralMesh.both(CitadelCore);
      seen.value = await seen.inner;
    },
  };
  await serve({ CitadelCore });
  const { state, error } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED", error);
  assert.ok(seen.inner instanceof Promise);
  assert.deepEqual([seen.outer, seen.passed, seen.value], ["later", "passed", "settled"]);
});

test("modules of two processes may call each other at the same time", async () => {
  const order: string[] = [];
  const make = (own: string, other: string) => ({
    count: 0,
    add() {
      return ++this.count;
    },
    run(context: any) {
      const neighbour = context[other];
      for (let n = 0; n < 20; n++) neighbour.add();
      order.push(own);
    },
  });
  const [a, b] = [make("a", "b"), make("b", "a")];
  const options = (name: string, reads: string) => ({
    sequential: false,
    registrations: { [name]: { reads: [reads] } },
  });
  await serve({ a }, options("a", "b"));
  await serve({ b }, options("b", "a"));
  const { state, error } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED", error);
  assert.deepEqual([a.count, b.count, order.sort()], [20, 20, ["a", "b"]]);
});

test("collections of other processes are copies", async () => {
  let seen: any;
  await serve({ agents: [{ id: "wolf" }] });
  const LatentCollaboration = {
    run({ agents }: any) {
      seen = agents;
    },
  };
  await serve({ LatentCollaboration }, { registrations: { LatentCollaboration: { reads: ["agents"] } } });
  await cycle(service.address);
  assert.deepEqual(seen, [{ id: "wolf" }]);
});

test("a collection that can't be copied is an issue of its readers", async () => {
  await serve({ agents: [() => "wolf"] });
  await serve({ LatentCollaboration: { run() {} } }, { registrations: { LatentCollaboration: { reads: ["agents"] } } });
  const { subsystems } = await cycle(service.address);
  const { issues } = subsystems.find(({ name }) => name === "LatentCollaboration")!;
  const { code, message } = issues[0]!;
  assert.equal(code, "NO_METHODS");
  assert.match(message, /^only the output of agents can be had: .* INTERNAL: TypeError: agents\[0\] is a function/);
});

test("a module can be called after the cycle, and its new methods are there in the next one", async () => {
  const mesh: any = { add: (n: number) => n + 1 };
  let remote: any;
  await serve({ NeuralMesh: mesh });
  const CitadelCore = {
    run({ neuralMesh }: any) {
      remote = neuralMesh;
    },
  };
  await serve({ CitadelCore });
  await cycle(service.address);
  const first = remote;
  assert.equal(first.add(1), 2);
  await cycle(service.address);
  assert.equal(remote, first, "the same object, so that it can be a key");
  mesh.twice = (n: number) => n * 2;
  await cycle(service.address);
  assert.equal(remote.twice(2), 4);
});

test("an owner that is gone, or never answers, is named by the call, and by the next cycle", async () => {
  const hanging = fileURLToPath(new URL("./hanging-process.js", import.meta.url));
  const child = await start(process.execPath, [hanging, `http://${service.address}`]);
  let ended = false;
  atEnd(() => ended || child.stop("SIGKILL"));
  const said: string[] = [];
  const CitadelCore = {
    run({ neuralMesh }: any) {
      for (const method of ["fine", "hang", "fine"]) {
        try {
          said.push(neuralMesh[method]());
        } catch (error) {
          said.push((error as Error).message);
        }
      }
    },
  };
  await serve({ CitadelCore }, { callTimeout: "2s", registrations: { CitadelCore: { timeout: "20s" } } });
  await orchestrator(service.address).call("RunCycle", { subsystems: ["CitadelCore"] });
  const owner = `in another process, http://${child.address}`;
  assert.deepEqual(said, [
    "fine",
    `NeuralMesh.hang() ${owner}: no answer within 2000 ms; it may have been carried out`,
    `NeuralMesh.fine() ${owner}: no answer within 2000 ms; it may have been carried out`,
  ]);
  await child.stop("SIGKILL");
  ended = true;
  said.length = 0;
  const { telemetry } = await orchestrator(service.address).call("RunCycle", { subsystems: ["CitadelCore"] });
  assert.match(said[0]!, /undefined/, "without its methods, it is absent as in a context without it");
  const issues = telemetry!.subsystems[0]!.issues.map(({ code, message }) => `${code}: ${message}`);
  assert.equal(issues.length, 1);
  assert.match(
    issues[0]!,
    new RegExp(
      `^NO_METHODS: only the output of NeuralMesh can be had: http://${child.address} answered (UNAVAILABLE|DEADLINE_EXCEEDED)`,
    ),
  );
  await orchestrator(service.address).call("UnregisterSubsystem", { name: "NeuralMesh" });
  const again = await orchestrator(service.address).call("RunCycle", { subsystems: ["CitadelCore"] });
  assert.deepEqual(
    again.telemetry!.subsystems[0]!.issues.map(({ code, message }) => `${code}: ${message}`),
    ["NOT_SERVED: no process serves NeuralMesh"],
  );
});

test("over TLS, only the processes of the option peers call each other", async () => {
  const directory = mkdtempSync(join(tmpdir(), "peers-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const pki = join(directory, "pki");
  const names = ["NeuralMesh", "CitadelCore", "FieldLayer"];
  for (const args of [["init"], ...names.map((name) => ["issue", "subsystem", name, "--host", "127.0.0.1"])]) {
    const { code, output } = await run(PROGRAM, ["certs", "--dir", pki, ...args]);
    assert.equal(code, 0, output);
  }
  // The processes look up where the others are.
  const config = join(directory, "orchestrator.toml");
  writeFileSync(
    config,
    '[[access.grants]]\nwho = ["cert:spiffe://fleet/subsystem/*"]\nrole = "viewer"\nsubsystems = ["*"]\n',
  );
  const secure = await startOrchestrator("127.0.0.1:0", "--secure", pki, "--config", config);
  atEnd(() => secure.stop());
  const url = `https://localhost:${secure.address.split(":")[1]}`;
  const options = (name: string, peers: string[]) => ({ orchestrator: url, credentials: join(pki, name), peers });
  const added: string[] = [];
  const use = (name: string) => ({ run: ({ neuralMesh }: any) => void neuralMesh?.add?.(name) });
  const mesh = await serve(
    { NeuralMesh: { add: (name: string) => void added.push(name) } },
    options("NeuralMesh", ["spiffe://fleet/subsystem/Cit*"]),
  );
  await serve({ CitadelCore: use("CitadelCore") }, options("CitadelCore", ["spiffe://fleet/subsystem/NeuralMesh"]));
  const field = await serve({ FieldLayer: use("FieldLayer") }, options("FieldLayer", ["spiffe://fleet/subsystem/*"]));
  const { stdout } = await run(PROGRAM, [
    "run",
    "--address",
    url,
    "--credentials",
    join(pki, "admin"),
    "--output",
    "json",
  ]);
  const { telemetry } = JSON.parse(stdout);
  assert.equal(telemetry.state, "CYCLE_STATE_SUCCEEDED", stdout);
  assert.deepEqual(added, ["CitadelCore"]);
  const issuesOf = (name: string) => {
    const part = telemetry.subsystems.find((part: any) => part.name === name);
    return (part.issues ?? []).filter(({ code }: any) => code === "NO_METHODS").map(({ message }: any) => message);
  };
  assert.deepEqual(issuesOf("CitadelCore"), []);
  const denied = "spiffe://fleet/subsystem/FieldLayer may not call modules here: name it in the option peers";
  assert.deepEqual(issuesOf("FieldLayer"), [
    `only the output of NeuralMesh can be had: https://${mesh.address} answered PERMISSION_DENIED: ${denied}`,
  ]);
  // Without the option, no process is called.
  await field.stop();
  await serve({ FieldLayer: use("FieldLayer") }, options("FieldLayer", []));
  const alone = JSON.parse(
    (await run(PROGRAM, ["run", "--address", url, "--credentials", join(pki, "admin"), "--output", "json"])).stdout,
  );
  const { issues } = alone.telemetry.subsystems.find((part: any) => part.name === "FieldLayer");
  assert.match(
    issues.find(({ code }: any) => code === "NO_METHODS").message,
    /over TLS, modules call only those of the processes that the option peers names$/,
  );
});

test("calls of modules that are not served here are refused", async () => {
  const { address } = await serve({ NeuralMesh: {} });
  const client = new Client(address, credentials.createInsecure());
  atEnd(() => client.close());
  const { Describe, Call } = MODULES;
  const described = new Promise((resolve) =>
    client.makeUnaryRequest(
      Describe.path,
      Describe.requestSerialize,
      Describe.responseDeserialize as any,
      { names: ["WolfPack"] },
      (error) => resolve(error?.code),
    ),
  );
  assert.equal(await described, status.NOT_FOUND);
  const called = new Promise((resolve) =>
    client
      .makeServerStreamRequest(Call.path, Call.requestSerialize, Call.responseDeserialize as any, {
        module: "WolfPack",
        member: "run",
      })
      .on("data", () => {})
      .on("error", (error: ServiceError) => resolve(error.code)),
  );
  assert.equal(await called, status.NOT_FOUND);
  // What every object has is not a method of a module.
  const responses: any[] = [];
  const request = { module: "NeuralMesh", member: "constructor", arguments: serialize([]) };
  const stream = client.makeServerStreamRequest(
    Call.path,
    Call.requestSerialize,
    Call.responseDeserialize as any,
    request,
  );
  stream.on("data", (response) => responses.push(response));
  await once(stream, "end");
  assert.match(String(responses[0].threw), /NeuralMesh has no member constructor/);
  assert.ok("NeuralMesh" in (await registered(service.address)));
});
