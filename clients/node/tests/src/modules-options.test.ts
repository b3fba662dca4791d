// Invalid options are refused before anything is served: the error names the option and valid values.

import assert from "node:assert/strict";
import { test } from "node:test";
import { getStatus, OrchestratorCore, runSingleCycle, serveSubsystems, startIntervalLoop } from "dreamnet-modules";

const module = { run() {} };
// Options that reach this point are valid.
const nobody = { orchestrator: "http://127.0.0.1:1", wait: "0s" };

/** Checks that serving with these options is refused with exactly this message. */
async function refused(options: object, text: string, objects: Record<string, object> = { FieldLayer: module }) {
  await assert.rejects(serveSubsystems(objects, { ...nobody, ...options }), { message: text });
}

test("an unknown option is refused, with the option that is meant", async () => {
  await refused({ leas: "30s" }, "leas is not an option: did you mean lease?");
  await refused({ readonly: [] }, "readonly is not an option: did you mean readOnly?");
  const all =
    "orchestrator, credentials, listen, endpoint, caller, lease, grace, unregister, wait, readOnly, run, " +
    "registrations, sequential, callTimeout, peers";
  await refused({ timeout: "30s" }, `timeout is not an option: the options are ${all}`);
  for (const call of [
    () => runSingleCycle({}, { ...nobody, orchestrater: "x" } as object),
    () => getStatus({ ...nobody, orchestrater: "x" } as object),
    async () => OrchestratorCore.getStatus({ ...nobody, orchestrater: "x" } as object),
    async () => startIntervalLoop({}, 5000, { ...nobody, orchestrater: "x" } as object),
  ]) {
    await assert.rejects(call(), {
      name: "OptionError",
      message: "orchestrater is not an option: did you mean orchestrator?",
    });
  }
  assert.throws(() => startIntervalLoop({}, 5000, { lop: "x" } as object), {
    message: "lop is not an option: did you mean loop?",
  });
  await refused({ loop: "x" }, `loop is not an option: the options are ${all}`);
});

test("an invalid value of an option is refused, with what to give", async () => {
  await refused(
    { listen: "127.0.0.1" },
    "listen is '127.0.0.1'; give http://HOST:PORT, https://HOST:PORT or unix:/PATH",
  );
  await refused({ lease: "0s" }, "lease is '0s'; give 1 s to 24 h");
  await refused({ lease: 30 }, 'lease is 30 without a unit; give "30s" or "30ms"');
  await refused({ wait: 5 }, 'wait is 5; give a duration of 0 ms to 1 h, such as "30s"');
  await refused({ callTimeout: "0s" }, "callTimeout is '0s'; give a duration of 1 ms to 1 h, such as \"30s\"");
  await refused(
    { readOnly: "FieldLayer" },
    "readOnly is 'FieldLayer'; give an array of names, such as [\"FieldLayer\"]",
  );
  await refused({ peers: "spiffe://a" }, "peers is 'spiffe://a'; give an array of names, such as [\"FieldLayer\"]");
  await refused({ caller: 1 }, 'caller is 1; give a URI, such as "spiffe://fleet/core"');
  await refused({ sequential: "no" }, "sequential is 'no'; give true or false");
  await refused({ registrations: [] }, "registrations is []; give an object with registrations, by name");
  await refused(
    { orchestrator: "ftp://a:1" },
    "orchestrator is 'ftp://a:1'; give http://HOST:PORT, https://HOST:PORT or unix:/PATH",
  );
  const interval = (ms: unknown) => () => startIntervalLoop({}, ms as number, nobody);
  assert.throws(interval(Number.NaN), { message: "intervalMs is NaN; give milliseconds, more than 0" });
  assert.throws(interval("5s"), { message: "intervalMs is '5s'; give milliseconds, more than 0" });
});

test("an argument that is not an object with modules is refused", async () => {
  const takes = "give an object with the modules by name";
  await assert.rejects((serveSubsystems as any)(), { message: `the first argument is undefined; ${takes}` });
  await assert.rejects((runSingleCycle as any)(), { message: `the first argument is undefined; ${takes}` });
  await refused({}, `the first argument is []; ${takes}`, [] as any);
});

test("a port in use is named", async () => {
  const first = await serveSubsystems({ total: module });
  try {
    const listen = first.address;
    await assert.rejects(
      serveSubsystems({ total: module }, { listen }),
      new RegExp(`can't listen on ${listen}: .*EADDRINUSE`),
    );
  } finally {
    await first.stop();
  }
});

test("an invalid field of a registration is refused by its name", async () => {
  const registered = (settings: object, text: string) =>
    refused({ registrations: { FieldLayer: settings } }, `subsystem FieldLayer${text}`);
  await registered({ timeout: 30 }, ': timeout is 30 without a unit; give "30s" or "30ms"');
  await registered({ timout: "30s" }, " has no option timout: did you mean timeout?");
  await registered({ retry: { maxAttempt: 3 } }, ": retry has no option maxAttempt: did you mean maxAttempts?");
  await registered({ critical: "no" }, ": critical is 'no'; give true or false");
  await registered(
    { parameters: { id: 2n ** 60n } },
    ": parameters.id is a BigInt, which JSON can't represent; send a string",
  );
  await refused(
    { registrations: { FieldLayer: 30 } },
    'registrations.FieldLayer is 30; give an object, such as { timeout: "30s" }',
  );
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
  await refused(
    { readOnly: ["FieldLayr"] },
    "readOnly names FieldLayr, which is not among the objects: did you mean FieldLayer?",
  );
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
  for (const orchestrator of ["http://127.0.0.1:1", "http://127.0.0.1:1/", "127.0.0.1:1"]) {
    const options = { ...nobody, orchestrator };
    const unreachable = { message: /the orchestrator at http:\/\/127\.0\.0\.1:1 can't be reached/ };
    await assert.rejects(serveSubsystems({ FieldLayer: module }, options), unreachable);
    await assert.rejects(runSingleCycle({ FieldLayer: module }, options), unreachable);
    await assert.rejects(getStatus(options), unreachable);
    process.env.ORCHESTRATOR_ADDRESS = orchestrator;
    try {
      await assert.rejects(getStatus({ wait: "0s" }), unreachable);
    } finally {
      delete process.env.ORCHESTRATOR_ADDRESS;
    }
  }
});
