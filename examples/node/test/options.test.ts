// Invalid options are refused before anything is served: the error names the option and valid values.

import assert from "node:assert/strict";
import { test } from "node:test";
import { getStatus, runSingleCycle, serveSubsystems, startIntervalLoop } from "../src/dreamnet.js";
import { orchestratorAddress, parametersOf } from "../src/options.js";

const module = { run() {} };
// Options that reach this point are valid.
const nobody = { orchestrator: "127.0.0.1:1", waitSeconds: 0 };

/** Checks that serving with these options is refused with exactly this message. */
async function refused(options: object, text: string, objects: Record<string, object> = { FieldLayer: module }) {
  await assert.rejects(serveSubsystems(objects, { ...nobody, ...options }), { message: text });
}

test("an unknown option is refused, with the option that is meant", async () => {
  await refused({ leaseSecond: 30 }, "leaseSecond is not an option: did you mean leaseSeconds?");
  await refused({ readonly: [] }, "readonly is not an option: did you mean readOnly?");
  const all = "listen, orchestrator, credentials, caller, waitSeconds, leaseSeconds, endpoint, readOnly, run, registrations, sequential";
  await refused({ timeout: 30 }, `timeout is not an option: there are ${all}`);
  for (const call of [
    () => runSingleCycle({}, { ...nobody, orchestrater: "x" } as object),
    () => getStatus({ ...nobody, orchestrater: "x" } as object),
    async () => startIntervalLoop({}, 5000, { ...nobody, orchestrater: "x" } as object),
  ]) {
    await assert.rejects(call(), { message: "orchestrater is not an option: did you mean orchestrator?" });
  }
  assert.throws(() => startIntervalLoop({}, 5000, { lop: "x" } as object), { message: "lop is not an option: did you mean loop?" });
  await refused({ loop: "x" }, `loop is not an option: there are ${all}`);
});

test("an invalid value of an option is refused, with the valid ones", async () => {
  await refused({ listen: "127.0.0.1" }, "listen is '127.0.0.1': give a string, \"HOST:PORT\"");
  await refused({ listen: ":50051" }, "listen is ':50051': give a string, \"HOST:PORT\"");
  await refused({ listen: 50051 }, 'listen is 50051: give a string, "HOST:PORT"');
  await refused({ leaseSeconds: 0 }, "leaseSeconds is 0: give seconds, more than 0");
  await refused({ leaseSeconds: "30s" }, "leaseSeconds is '30s': give seconds, more than 0");
  await refused({ waitSeconds: NaN }, "waitSeconds is NaN: give seconds, 0 or more");
  await refused({ readOnly: "FieldLayer" }, "readOnly is 'FieldLayer': give an array of names, such as [\"FieldLayer\"]");
  await refused({ credentials: "" }, "credentials is '': give a directory with cert.pem, key.pem and ca.pem");
  await refused({ caller: 1 }, 'caller is 1: give a URI, such as "spiffe://fleet/core"');
  await refused({ sequential: "no" }, "sequential is 'no': give true or false");
  await refused({ registrations: [] }, "registrations is []: give an object with registrations, by name");
  assert.throws(() => startIntervalLoop({}, NaN, nobody), { message: "intervalMs is NaN: give milliseconds, more than 0" });
  assert.throws(() => startIntervalLoop({}, "5s" as any, nobody), { message: "intervalMs is '5s': give milliseconds, more than 0" });
});

test("an argument that is not an object with modules is refused", async () => {
  const takes = "give an object with the modules by name";
  await assert.rejects((serveSubsystems as any)(), { message: `the first argument is undefined: ${takes}` });
  await assert.rejects((runSingleCycle as any)(), { message: `the first argument is undefined: ${takes}` });
  await refused({}, `the first argument is []: ${takes}`, [] as any);
});

test("a port in use is named", async () => {
  const first = await serveSubsystems({ total: module });
  try {
    const listen = first.address;
    await assert.rejects(serveSubsystems({ total: module }, { listen }), new RegExp(`can't listen on ${listen}: .*EADDRINUSE`));
  } finally {
    await first.stop();
  }
});

test("an invalid field of a registration is refused by its path", async () => {
  const registered = (settings: object, text: string) => refused({ registrations: { FieldLayer: settings } }, text);
  const at = "registrations.FieldLayer";
  const duration = "give a duration as an object, such as { seconds: 30 } or { nanos: 500_000_000 }";
  await registered({ timeout: 30 }, `${at}.timeout is 30: ${duration}`);
  await registered({ timeout: "30s" }, `${at}.timeout is '30s': ${duration}`);
  await registered({ timeout: { seconds: 0.5 } }, `${at}.timeout is { seconds: 0.5 }: ${duration}`);
  await registered({ timeout: { ms: 500 } }, `${at}.timeout is { ms: 500 }: ${duration}`);
  await registered({ breaker: { openFor: 5 } }, `${at}.breaker.openFor is 5: ${duration.replace("30", "5")}`);
  await registered({ timout: {} }, `${at}.timout is not a field of a registration: did you mean timeout?`);
  await registered({ retry: { attempts: 3 } }, `${at}.retry.attempts is not a field of a retry policy: ` +
    "there are maxAttempts, initialBackoff, maxBackoff, backoffMultiplier, retryableStatusCodes");
  await registered({ retry: { maxAttempt: 3 } }, `${at}.retry.maxAttempt is not a field of a retry policy: did you mean maxAttempts?`);
  await registered({ limits: { maxMetrics: -1 } }, `${at}.limits.maxMetrics is -1: give a whole number from 0 to 4294967295`);
  await registered({ phase: "30" }, `${at}.phase is '30': give a whole number from -2147483648 to 2147483647`);
  await registered({ critical: "no" }, `${at}.critical is 'no': give true or false`);
  await registered({ reads: "NeuralMesh" }, `${at}.reads is 'NeuralMesh': give an array of names, such as ["FieldLayer"]`);
  await registered(30 as any, `${at} is 30: give an object with phase, requires, after, reads, timeout, retry, breaker, ` +
    "critical, parameters, limits, recordOutput, tls");
});

test("parameters are plain data, and refused if they would arrive changed", async () => {
  const registered = (parameters: unknown, text: string) =>
    refused({ registrations: { FieldLayer: { parameters } } }, `registrations.FieldLayer.parameters ${text}`);
  await registered({ id: 2n ** 60n }, "can't be sent: id: a BigInt: give it as a string");
  await registered({ id: 2 ** 53 }, "can't be sent: id: over 2^53, so not exact: give it as a string");
  await registered({ inner: [{ ratio: NaN }] }, "can't be sent: inner[0].ratio: NaN");
  await registered({ made: new Map() }, "can't be sent: made: a Map");
  await registered("fast", "is 'fast': give an object with plain data");
  assert.deepEqual(parametersOf({ most: 2 ** 53 - 1, slow: true }, "parameters"), {
    fields: { most: { numberValue: 2 ** 53 - 1 }, slow: { boolValue: true } },
  });
});

test("misspelt names of modules are refused, with the name that is meant", async () => {
  const own = (name: string) => `For a module of your own, add it to registrations: { "${name}": {} }`;
  for (const [name, meant] of [
    ["FieldLayr", "FieldLayer"],
    ["fieldLayer", "FieldLayer"],
    ["DreamVaultCore", "DreamVault"],
    ["DreamTank", "DreamTankCore"],
    ["wolf_pack", "WolfPack"],
  ] as const) {
    await refused({}, `${name} is not a name of DreamNet: did you mean ${meant}? ${own(name)}`, { [name]: module });
    await assert.rejects(runSingleCycle({ [name]: module }, nobody), /did you mean/);
  }
  await refused({ readOnly: ["FieldLayr"] }, "readOnly names FieldLayr, which is not among the objects: did you mean FieldLayer?");
  await refused({ run: ["WolfPack"] }, "run names WolfPack, which is not among the objects");
  await refused({ run: ["FieldLayer"], readOnly: ["FieldLayer"] }, "FieldLayer is named in run and in readOnly");
  await refused(
    { registrations: { Fieldlayer: {} } },
    "registrations names Fieldlayer, which is not among the objects: did you mean FieldLayer?",
  );
  await refused(
    { registrations: { FieldLayer: { reads: ["NeuralMsh"] } } },
    "registrations.FieldLayer names NeuralMsh, which is not a name of DreamNet: did you mean NeuralMesh?",
  );
});

test("names of one's own are accepted", async () => {
  // All of these fail only because the orchestrator is unreachable.
  const taken = (objects: object, options = {}) =>
    assert.rejects(serveSubsystems(objects as Record<string, object>, { ...nobody, ...options }), /can't be reached/);
  await taken({ total: module, agents: [], Wolf: module });
  // Another instance, and a name that is confirmed.
  await taken({ FieldLayer2: module });
  await taken({ DreamShip: module }, { registrations: { DreamShip: { reads: ["sensor", "NeuralMesh3"] } } });
});

test("the address of an orchestrator has the same forms everywhere", async () => {
  for (const [given, address] of [
    ["127.0.0.1:7701", "127.0.0.1:7701"],
    ["http://127.0.0.1:7701", "127.0.0.1:7701"],
    ["http://127.0.0.1:7701/", "127.0.0.1:7701"],
    [" orchestrator.internal:80 ", "orchestrator.internal:80"],
    ["orchestrator.internal", "orchestrator.internal:7700"],
    ["http://orchestrator.internal", "orchestrator.internal:80"],
    ["[::1]:7701", "[::1]:7701"],
    ["http://[::1]", "[::1]:80"],
    [":7701", "127.0.0.1:7701"],
  ] as const) {
    assert.equal(orchestratorAddress(given), address);
  }
  const forms = "give HOST, HOST:PORT or http://HOST:PORT";
  for (const given of ["", "http://", "http://:1", "ftp://host", "unix:/run/it", "host:99999", "a b:1", "host:1/path", "::1", 7700, {}]) {
    assert.throws(() => orchestratorAddress(given), (error: Error) => error.message.endsWith(forms), String(given));
  }
  assert.throws(() => orchestratorAddress("https://host:1"), { message: `orchestrator is 'https://host:1': ${forms}: TLS needs the option credentials` });
  const secure = (address: string) => orchestratorAddress(address, "orchestrator", "pki/main");
  for (const [given, address] of [
    ["host", "host:7700"],
    ["https://host", "host:443"],
    ["https://host:1/", "host:1"],
  ] as const) {
    assert.equal(secure(given), address);
  }
  assert.throws(() => secure("http://host:1"), { message: "orchestrator is 'http://host:1': give HOST, HOST:PORT or https://HOST:PORT" });

  const orchestrator = "http://127.0.0.1:1";
  const unreachable = /the orchestrator at 127\.0\.0\.1:1 can't be reached/;
  await refusedBy(() => serveSubsystems({ FieldLayer: module }, { ...nobody, orchestrator }), unreachable);
  await refusedBy(() => runSingleCycle({ FieldLayer: module }, { ...nobody, orchestrator }), unreachable);
  await refusedBy(() => getStatus({ ...nobody, orchestrator }), unreachable);
  process.env.ORCHESTRATOR_ADDRESS = orchestrator;
  try {
    await refusedBy(() => getStatus({ waitSeconds: 0 }), unreachable);
    process.env.ORCHESTRATOR_ADDRESS = "https://127.0.0.1:1";
    await refusedBy(() => getStatus({ waitSeconds: 0 }), /^ORCHESTRATOR_ADDRESS is 'https:\/\/127\.0\.0\.1:1': give HOST/);
  } finally {
    delete process.env.ORCHESTRATOR_ADDRESS;
  }
});

const refusedBy = (call: () => Promise<unknown>, message: RegExp) => assert.rejects(call(), { message });
