// DreamNet's 28 modules, run by the service, end in the same state as in DreamNet's own loop.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { getStatus, READ_ONLY, runSingleCycle, stopServing, type OrchestratorContext } from "../src/dreamnet.js";
import { contextKey, TOPOLOGY, type Settings, type SubsystemName } from "../src/topology.js";
import { cycle, orchestrator, startOrchestrator, type Running } from "./support.js";

const NAMES = Object.keys(TOPOLOGY) as SubsystemName[];

/** The modules that DreamNet's loop runs, one after another. */
const LOOP: readonly SubsystemName[] = [
  "CitadelCore",
  "LatentCollaboration",
  "FieldLayer",
  "AgentRegistryCore",
  "EconomicEngineCore",
  "DreamTankCore",
  "InitRitualCore",
  "ZenGardenCore",
  "DreamBetCore",
  "SocialHubCore",
  "DreamShop",
  "DreamVault",
  "LiquidityEngine",
  "WolfPackFundingCore",
  "WolfPackAnalystCore",
  "CivicPanelCore",
  "DreamNetOSCore",
];
const WITHOUT_RUN: readonly string[] = ["NeuralMesh", "AgentWalletManager"];
const WITHOUT_STATUS: readonly string[] = ["AgentWalletManager", "LatentCollaboration"];

/** Simulates a module. Its state depends on the state of the others at that time, and it changes them. */
class Stateful {
  memory = 1;
  runs = 0;

  remember(value: number): number {
    this.memory = (this.memory * 31 + value) % 1_000_003;
    return this.memory;
  }

  work(context: Record<string, Stateful>) {
    this.runs += 1;
    for (const key of Object.keys(context).sort()) {
      const other = context[key]!;
      // The result of Citadel can't be called.
      this.remember(key === "citadelSnapshot" ? other.memory : other.remember(this.memory));
    }
    return this.state();
  }

  state() {
    return { memory: this.memory, runs: this.runs };
  }
}

/** All 28: some are synchronous, some take a few turns. `order` records which module runs. */
function fleet(order: string[]): Record<SubsystemName, Stateful & { run?: any; status?: any }> {
  const modules = NAMES.map((name, i) => {
    const module: Stateful & { run?: any; status?: any } = new Stateful();
    if (!WITHOUT_STATUS.includes(name)) module.status = module.state;
    if (!WITHOUT_RUN.includes(name)) {
      module.run = async (context: Record<string, Stateful>) => {
        order.push(name);
        for (let turn = 0; turn < i % 3; turn++) await new Promise((resolve) => setImmediate(resolve));
        return module.work(context);
      };
    }
    return [name, module] as const;
  });
  return Object.fromEntries(modules) as Record<SubsystemName, Stateful>;
}

/** A cycle as in DreamNet's own loop: in one process, one after another, each with its part of the context. */
async function original(context: ReturnType<typeof fleet>): Promise<void> {
  let citadelSnapshot: unknown;
  for (const name of LOOP) {
    const { after, reads } = TOPOLOGY[name] satisfies Settings;
    const given = Object.fromEntries(
      [...after, ...reads].map((input) => [
        contextKey(input),
        input === "CitadelCore" ? citadelSnapshot : context[input as SubsystemName],
      ]),
    );
    const returned = await context[name].run(given);
    if (name === "CitadelCore") citadelSnapshot = returned;
  }
}

let service: Running;
before(async () => {
  service = await startOrchestrator();
});
after(async () => assert.equal(await service.stop(), 0));

test("DreamNet's modules end in the same state as in its own loop, in every cycle", async () => {
  const [expected, observed]: [string[], string[]] = [[], []];
  const plain = fleet(expected);
  const served = fleet(observed);
  const options = { orchestrator: service.address };
  try {
    for (let n = 1; n <= 3; n++) {
      await original(plain);
      const telemetry = await runSingleCycle(served as OrchestratorContext, options);
      assert.equal(telemetry.error, undefined);
      assert.ok(telemetry.startedAt <= telemetry.finishedAt && telemetry.finishedAt <= Date.now() + 1);
      assert.ok(Math.abs(telemetry.finishedAt - telemetry.startedAt - telemetry.durationMs) < 0.01);
      assert.deepEqual(observed, expected, "the same ones run, in the same order");
      const equal = NAMES.filter((name) => {
        assert.deepEqual(served[name].state(), plain[name].state(), `${name}, cycle ${n}`);
        return served[name].status !== undefined;
      });
      assert.equal(equal.length, 26);
    }

    // The orchestrator shows the same states.
    const { status } = await orchestrator(service.address)((client, callback) =>
      client.getStatus({ includeSnapshots: true }, callback),
    );
    for (const { registration, snapshot } of status.subsystems) {
      const { memory } = plain[registration.name as SubsystemName];
      assert.equal(snapshot?.fields.memory.numberValue, WITHOUT_STATUS.includes(registration.name) ? undefined : memory);
    }
    const { totalCycles, lastCycle } = await getStatus(options);
    assert.equal(lastCycle?.cycleId, totalCycles);

    // Nothing waits for modules that are only read, nor do they wait for each other.
    const { plan } = await orchestrator(service.address)((client, callback) => client.planCycle({}, callback));
    const planned: SubsystemName[] = plan.subsystems.map(({ name }: { name: SubsystemName }) => name);
    assert.deepEqual(planned.filter((name) => LOOP.includes(name)), LOOP);
    const { subsystems } = await orchestrator(service.address)((client, callback) => client.listSubsystems({}, callback));
    const waits = subsystems.filter(({ registration }: any) => registration.phase === 0 && registration.after.length > 0);
    assert.deepEqual(waits, []);

    // A cycle reports which modules were only read; their outputs are their current state.
    const { subsystems: parts } = await cycle(service.address);
    const read = parts.filter(({ issues }) => issues.some(({ code }) => code === "READ_ONLY"));
    assert.deepEqual(new Set(read.map(({ name }) => name)), new Set([...READ_ONLY, ...WITHOUT_RUN]));
    assert.ok(read.every(({ state, output, name }) =>
      state === "SUBSYSTEM_STATE_SUCCEEDED" && (output?.fields?.memory !== undefined) !== WITHOUT_STATUS.includes(name)));
  } finally {
    await stopServing(served as OrchestratorContext);
  }
});
