// How a fleet stops, and its health.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { Fleet, FleetError, type Cycle } from "dreamnet-subsystem";
import { atEnd, event, serving } from "./support.js";

const fleetOf = (run: (cycle: Cycle) => any, options = {}) => {
  const fleet = new Fleet({ orchestrator: "", log: () => {}, ...options });
  fleet.subsystem("it", run);
  return fleet;
};

test("running calls end, and new ones are unavailable", async () => {
  const [began, proceed] = [event(), event()];
  const fleet = fleetOf(async () => {
    began.happen();
    await proceed.happened;
    return { text: "x".repeat(32 * 1024 * 1024) };
  });
  fleet.subsystem("other", () => {});
  const { caller, ended } = await serving(fleet);
  assert.equal(await caller.health(), 1);
  const running = caller.output(1);
  await began.happened;
  fleet.stop();
  const repeated = caller.output(1);
  while ((await caller.health()) === 1);
  await assert.rejects(caller.runCycle(1, { subsystem: "other" }), /UNAVAILABLE: other is shutting down/);
  proceed.happen();
  // The last answers arrive whole.
  for (const answer of [await running, await repeated]) assert.equal(String(answer.text).length, 32 * 1024 * 1024);
  await ended;
});

test("work beyond the grace period is stopped, and named if it does not end", async () => {
  for (const endsBySignal of [true, false]) {
    const began = event();
    const log: string[] = [];
    const run = ({ signal }: Cycle) =>
      new Promise((_, reject) => {
        began.happen();
        if (endsBySignal) signal.addEventListener("abort", () => reject(signal.reason));
      });
    const fleet = fleetOf(run, { grace: "50ms", log: (line: string) => log.push(line) });
    const { caller, ended } = await serving(fleet);
    const failed = assert.rejects(caller.runCycle(1), /CANCELLED|UNAVAILABLE/);
    await began.happened;
    fleet.stop();
    await ended;
    await failed;
    assert.ok(log.includes("running calls are cut off"));
    assert.equal(log.includes("left behind, still running: it"), !endsBySignal);
  }
});

test("a fleet serves at a unix socket, and again after it has stopped", async () => {
  const directory = mkdtempSync(join(tmpdir(), "socket-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const fleet = fleetOf(() => ({ a: 1 }), { listen: `unix:${directory}/s` });
  for (const _ of [1, 2]) {
    const { caller, ended } = await serving(fleet);
    assert.deepEqual(await caller.output(1), { a: 1 });
    fleet.stop();
    await ended;
  }
});

test("a port in use, a fleet without a subsystem, and one that is served twice are refused", async () => {
  const fleet = fleetOf(() => ({}));
  const { endpoint } = await serving(fleet);
  const listen = endpoint.replace("http://", "");
  await assert.rejects(fleetOf(() => {}, { listen }).serve(), (error: Error) => {
    assert.ok(error instanceof FleetError);
    assert.match(error.message, new RegExp(`^can't listen on ${listen}: .*EADDRINUSE`));
    return true;
  });
  await assert.rejects(fleet.serve(), /already being served/);
  await assert.rejects(new Fleet({ orchestrator: "" }).serve(), /the fleet has no subsystem/);
});
