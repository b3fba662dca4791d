// What the record of a cycle says of the modules of a process that dies in it.

import assert from "node:assert/strict";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { atEnd, cycle, start, startOrchestrator } from "./support.js";
import { LOOP } from "./standin.js";

test("the record tells the module that was running when its process died from those that were never called", async () => {
  const service = await startOrchestrator();
  atEnd(() => service.stop());
  const program = fileURLToPath(new URL("./dying-process.js", import.meta.url));
  const child = await start(process.execPath, [program, `http://${service.address}`, "DreamTankCore"]);
  atEnd(() => child.stop("SIGKILL"));
  assert.equal((await cycle(service.address)).state, "CYCLE_STATE_SUCCEEDED");

  const { state, subsystems } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_DEGRADED");
  const part = new Map(subsystems.map((it) => [it.name, it]));
  const at = LOOP.indexOf("DreamTankCore");
  for (const name of LOOP.slice(0, at)) assert.equal(part.get(name)!.state, "SUBSYSTEM_STATE_SUCCEEDED", name);
  const running = part.get("DreamTankCore")!;
  assert.equal(running.errorCode, "UNAVAILABLE");
  assert.match(running.errorMessage, /^the connection was lost during the call: .*; can't connect: /);
  assert.equal(running.attempts, 3);
  for (const name of LOOP.slice(at + 1)) {
    const { errorCode, errorMessage, attempts } = part.get(name)!;
    assert.equal(errorCode, "UNAVAILABLE", name);
    assert.match(errorMessage, /^can't connect: .* the endpoint refused DreamTankCore in this cycle as well$/, name);
    // The endpoint was waited for once.
    assert.equal(attempts, 1, name);
  }
});
