// Fleets with the real service.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { credentials, Server, ServerCredentials, type sendUnaryData, type ServerUnaryCall } from "@grpc/grpc-js";
import { Fleet, Orchestrator, type Cycle, type FleetOptions } from "dreamnet-subsystem";
import { ORCHESTRATOR } from "../../subsystem/dist/contract.js";
import { fromStruct } from "../../subsystem/dist/objects.js";
import {
  atEnd,
  Caller,
  cycle,
  event,
  nobodyThere,
  PROGRAM,
  registered,
  run,
  serving,
  start,
  startOrchestrator,
  untilRegistry,
} from "./support.js";

async function service(listen?: string, ...args: string[]): Promise<string> {
  const running = await startOrchestrator(listen, ...args);
  atEnd(() => running.stop());
  return running.address;
}

const fleetAt = (address: string, options: FleetOptions = {}) =>
  new Fleet({ orchestrator: `http://${address}`, lease: "1s", log: () => {}, ...options });

test("a fleet waits for the service, and takes part through its restart", async () => {
  const directory = mkdtempSync(join(tmpdir(), "service-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const store = ["--store", `sqlite:${directory}/orchestrator.db`];
  const place = await nobodyThere();
  const log: string[] = [];
  const initialized: object[] = [];
  const fleet = fleetAt(place.address, { log: (line) => log.push(line) });
  fleet.subsystem(
    "first",
    { parameters: { step: 2 }, initialize: (given) => initialized.push(given), status: () => ({ ok: true }) },
    (cycle) => {
      cycle.metric("cycle", cycle.cycleId);
      return { value: cycle.cycleId * Number(cycle.parameters.step) };
    },
  );
  fleet.subsystem("second", { after: ["first"], timeout: "4s" }, async (cycle) => {
    return { value: Number(cycle.inputs.get("first").output.value) + 1 };
  });
  const [problem, isRegistered] = [event(), event()];
  const { ended } = await serving(fleet, { onProblem: () => problem.happen(), onRegistered: isRegistered.happen });
  await problem.happened;
  await place.leave();
  let running = await startOrchestrator(place.address, ...store);
  await isRegistered.happened;
  for (const number of [1, 2]) {
    const { state, subsystems } = await cycle(running.address);
    assert.equal(state, "CYCLE_STATE_SUCCEEDED");
    assert.deepEqual(
      subsystems.map(({ output }) => fromStruct(output)),
      [{ value: 2 * number }, { value: 2 * number + 1 }],
    );
    assert.deepEqual(subsystems[0]!.metrics, { cycle: number });
  }
  assert.deepEqual(initialized, [{ step: 2 }]);

  await running.stop();
  running = await startOrchestrator(place.address, ...store);
  atEnd(() => running.stop());
  const { state, subsystems } = await cycle(running.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED");
  assert.deepEqual(fromStruct(subsystems[1]!.output), { value: 7 });
  assert.equal(initialized.length, 2);
  fleet.stop();
  await ended;
  assert.deepEqual(await registered(running.address), {});
  const waiting = log.filter((line) => line.includes("trying again") && line.includes("UNAVAILABLE"));
  assert.ok(waiting.length >= 1 && waiting.length <= 6, log.join("\n"));
  assert.ok(
    log.some((line) => line.startsWith("subsystems are registered with ")),
    log.join("\n"),
  );
});

test("a lost lease is registered again", async () => {
  const address = await service();
  const log: string[] = [];
  const fleet = fleetAt(address, { log: (line) => log.push(line) });
  fleet.subsystem("it", () => {});
  await serving(fleet);
  await untilRegistry(address, (all) => "it" in all);
  await new Orchestrator({ orchestrator: address }).call("UnregisterSubsystem", { name: "it" });
  await untilRegistry(address, (all) => "it" in all);
  assert.ok(
    log.some((line) => line.startsWith("it has lost its lease: ")),
    log.join("\n"),
  );
});

test("a dead process loses its registration", async () => {
  const address = await service();
  const fleet = fleetAt(address, { unregister: false });
  fleet.subsystem("it", () => {});
  const { ended } = await serving(fleet);
  await untilRegistry(address, (all) => "it" in all);
  fleet.stop();
  await ended;
  assert.ok("it" in (await registered(address)));
  await untilRegistry(address, (all) => !("it" in all));
});

test("a successor keeps its registration", async () => {
  const address = await service();
  const [old, successor] = [fleetAt(address), fleetAt(address)];
  for (const fleet of [old, successor]) fleet.subsystem("it", () => {});
  const { ended } = await serving(old);
  await untilRegistry(address, (all) => "it" in all);
  const { endpoint } = await serving(successor);
  const isNew = (all: Record<string, any>) => all.it?.registration.endpoint === endpoint;
  await untilRegistry(address, isNew);
  old.stop();
  await ended;
  assert.ok(isNew(await registered(address)));
});

test("an invalid registration ends the fleet, and none stays registered", async () => {
  const address = await service();
  const fleet = fleetAt(address);
  fleet.subsystem("a", { requires: ["b"] }, () => {});
  fleet.subsystem("b", { requires: ["a"] }, () => {});
  await assert.rejects(fleet.serve(), {
    name: "FleetError",
    message: /^subsystem b: circular dependency: a requires b/,
  });
  assert.deepEqual(await registered(address), {});
});

test("a fleet that stops is served until the running cycle has ended", async () => {
  const address = await service();
  const [began, proceed] = [event(), event()];
  const fleet = fleetAt(address);
  fleet.subsystem("first", () => {
    began.happen();
    return proceed.happened;
  });
  fleet.subsystem("second", { requires: ["first"] }, () => ({ ran: true }));
  const isRegistered = event();
  const { ended } = await serving(fleet, { onRegistered: isRegistered.happen });
  await isRegistered.happened;
  const record = cycle(address);
  await began.happened;
  fleet.stop();
  await untilRegistry(address, (all) => !("second" in all));
  proceed.happen();
  assert.equal((await record).state, "CYCLE_STATE_SUCCEEDED");
  await ended;
});

test("a program ends with one line, or on a signal with success", async () => {
  const address = await service();
  const program = fileURLToPath(new URL("./program.js", import.meta.url));
  const env = { ORCHESTRATOR_ADDRESS: address };
  const bad = await run(process.execPath, [program, address], { env });
  assert.equal(bad.code, 1);
  assert.match(bad.stderr, /can't listen on .*: No address added out of total 1 resolved errors: .*EADDRINUSE/);
  assert.doesNotMatch(bad.stderr, /\n +at /);
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    const running = await start(process.execPath, [program, "127.0.0.1:0"], env);
    await untilRegistry(address, (all) => "it" in all);
    assert.equal((await cycle(address)).state, "CYCLE_STATE_SUCCEEDED");
    assert.equal(await running.stop(signal), 0, running.log());
    assert.match(running.log(), /^it is unregistered$/m);
    assert.deepEqual(await registered(address), {});
  }
});

test("it passes the conformance check", async () => {
  const fleet = new Fleet({ orchestrator: "", log: () => {} });
  const work = async (cycle: Cycle) => {
    await cycle.sleep(Number(cycle.parameters.work_ms));
    return { cycle: cycle.cycleId };
  };
  fleet.subsystem("first", { initialize: () => {}, status: () => ({ a: 1 }) }, work);
  fleet.subsystem("second", { initialize: async () => {}, status: async () => ({ a: 1 }) }, work);
  const { endpoint } = await serving(fleet);
  for (const pair of [
    ["first", "second"],
    ["second", "first"],
  ]) {
    const names = pair.flatMap((name) => ["--subsystem", name]);
    const given = ["--strict", "--param", "work_ms=200", "--input", 'sensor={"value": 3}', "--output", "json"];
    const { code, stdout, output } = await run(PROGRAM, ["conformance", endpoint, ...names, ...given]);
    assert.equal(code, 0, output);
    // Only the first check after a start can see one of them.
    const checks = JSON.parse(stdout).checks.filter(({ name }: { name: string }) => name !== "run-before-initialize");
    assert.deepEqual(new Set(checks.map(({ outcome }: { outcome: string }) => outcome)), new Set(["PASSED"]), stdout);
  }
});

test("with TLS, only the orchestrator may call", async () => {
  const directory = mkdtempSync(join(tmpdir(), "tls-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const pki = join(directory, "pki");
  for (const args of [
    ["init"],
    ...["it", "other"].map((name) => ["issue", "subsystem", name, "--host", "localhost"]),
  ]) {
    const { code, output } = await run(PROGRAM, ["certs", "--dir", pki, ...args]);
    assert.equal(code, 0, output);
  }
  const address = await service("127.0.0.1:0", "--secure", pki);
  const orchestrator = `https://localhost:${address.split(":")[1]}`;
  const fleet = fleetAt(address, { orchestrator, credentials: join(pki, "it") });
  fleet.subsystem("it", () => ({ a: 1 }));
  const isRegistered = event();
  const { endpoint } = await serving(fleet, { onRegistered: isRegistered.happen });
  assert.match(endpoint, /^https:/);
  await isRegistered.happened;
  const admin = new Orchestrator({ orchestrator, credentials: join(pki, "admin") });
  const { subsystem } = await admin.call("GetSubsystem", { name: "it" });
  assert.equal(subsystem!.owner, "cert:spiffe://fleet/subsystem/it");
  const { telemetry } = await admin.call("RunCycle", { recordOutputs: true });
  assert.deepEqual(fromStruct(telemetry!.subsystems[0]!.output), { a: 1 });
  // Another subsystem of the fleet, with an epoch that would lock the orchestrator out.
  const file = (name: string) => readFileSync(join(pki, "other", name));
  const tls = credentials.createSsl(file("ca.pem"), file("key.pem"), file("cert.pem"));
  const other = new Caller(endpoint.replace("127.0.0.1", "localhost"), tls);
  await assert.rejects(
    other.runCycle(1, { epoch: 2 ** 52 }),
    /PERMISSION_DENIED: only spiffe:\/\/fleet\/core may call/,
  );
  assert.equal((await admin.call("RunCycle", {})).telemetry!.state, "CYCLE_STATE_SUCCEEDED");
});

test("a token is sent with each call", async () => {
  const directory = mkdtempSync(join(tmpdir(), "token-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const token = join(directory, "token");
  writeFileSync(token, "orc_1_2\n", { mode: 0o600 });
  const seen: unknown[] = [];
  const server = new Server();
  server.addService(ORCHESTRATOR, {
    RegisterSubsystem(call: ServerUnaryCall<any, any>, callback: sendUnaryData<any>) {
      seen.push(...call.metadata.get("authorization"));
      callback(null, {});
    },
  } as any);
  const port = await new Promise<number>((resolve) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (_, port) => resolve(port)),
  );
  atEnd(() => server.forceShutdown());
  const fleet = fleetAt(`127.0.0.1:${port}`, { credentials: token, unregister: false });
  fleet.subsystem("it", () => {});
  const isRegistered = event();
  await serving(fleet, { onRegistered: isRegistered.happen });
  await isRegistered.happened;
  assert.deepEqual(seen, ["Bearer orc_1_2"]);
});
