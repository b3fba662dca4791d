// The stand-in of DreamNet, run by the service in 1, 4 and 28 processes, ends in the same state as in DreamNet's own
// loop of plain calls, to the last bit.

import assert from "node:assert/strict";
import { fork, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { READ_ONLY, type SubsystemName } from "dreamnet-modules";
import { atEnd, cycle, orchestrator, startOrchestrator } from "./support.js";
import { LOOP, NAMES, original, standIn } from "./standin.js";

const CYCLES = 3;
const SEED = Number(process.env.TEST_SEED ?? 20_261_129);

type States = Record<string, ReturnType<ReturnType<typeof standIn>["state"]>>;

/** A process with these modules. */
async function start(seed: number, address: string, names: readonly SubsystemName[]): Promise<ChildProcess> {
  const program = fileURLToPath(new URL("./standin-process.js", import.meta.url));
  // Copies by structured clone, which keep every bit.
  const child = fork(program, [String(seed), `http://${address}`, ...names], { serialization: "advanced" });
  await once(child, "message");
  return child;
}

async function statesOf(processes: readonly ChildProcess[]): Promise<{ states: States; order: string[] }> {
  const answers = processes.map(async (child) => {
    const answer = once(child, "message");
    child.send("states");
    return (await answer)[0] as { states: States; order: string[] };
  });
  const all = await Promise.all(answers);
  return { states: Object.assign({}, ...all.map(({ states }) => states)), order: all.flatMap(({ order }) => order) };
}

/** The modules of one process beside those of the next, so that neighbours are apart. */
const dealt = (count: number) => Array.from({ length: count }, (_, i) => NAMES.filter((_, row) => row % count === i));

for (const count of [1, 4, 28]) {
  test(`in ${count} processes, modules end in the same state as in DreamNet's own loop`, async () => {
    const service = await startOrchestrator();
    atEnd(() => service.stop());
    const processes = await Promise.all(dealt(count).map((names) => start(SEED, service.address, names)));
    atEnd(async () => {
      const ended = processes.map((child) => once(child, "exit"));
      for (const child of processes) child.disconnect();
      await Promise.all(ended);
    });
    const ran: string[] = [];
    const plain = Object.fromEntries(NAMES.map((name) => [name, standIn(name, SEED, ran)]));
    for (let n = 1; n <= CYCLES; n++) {
      await original(plain);
      const { state, error, subsystems } = await cycle(service.address);
      assert.equal(state, "CYCLE_STATE_SUCCEEDED", error);
      // Nothing is amiss: the only issues are those of modules that are only read.
      const issues = subsystems.flatMap(({ name, issues }) =>
        issues.map(({ code, message }) => `${name} ${code} ${message}`),
      );
      assert.deepEqual(
        issues.filter((issue) => !issue.includes(" READ_ONLY ")),
        [],
      );
      assert.equal(issues.length, READ_ONLY.length + 2);
      const { states, order } = await statesOf(processes);
      for (const name of NAMES)
        assert.deepStrictEqual(states[name], plain[name]!.state(), `${name}, cycle ${n}, seed ${SEED}`);
      if (count === 1) assert.deepEqual(order, ran, "the same ones run, in the same order");
    }

    // The orchestrator plans them in the order of the loop, and shows the same statuses.
    const { plan } = await orchestrator(service.address).call("PlanCycle", {});
    const planned = plan!.subsystems.map(({ name }) => name);
    assert.deepEqual(
      planned.filter((name) => LOOP.includes(name as SubsystemName)),
      LOOP,
    );
    const { status } = await orchestrator(service.address).call("GetStatus", { includeSnapshots: true });
    const shown = status!.subsystems.filter(({ snapshot }) => snapshot !== null);
    assert.equal(shown.length, 26);
    for (const { registration, snapshot } of shown) {
      assert.equal(snapshot!.fields!.level!.numberValue, plain[registration!.name]!.level);
    }
  });
}
