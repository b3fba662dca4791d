// The package as users have it: packed, installed from its file into an empty project, and used there.

import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { fromStruct } from "../../subsystem/dist/objects.js";
import { atEnd, cycle, run, start, startOrchestrator, untilRegistry } from "./support.js";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));

let project: string;
let packed: string[];
before(async () => {
  project = await mkdtemp(join(tmpdir(), "project-"));
  await writeFile(join(project, "package.json"), JSON.stringify({ name: "project", type: "module", private: true }));
  const pack = ["pack", "--json", "--loglevel=error", "--ignore-scripts", "--pack-destination", project];
  const { code, stdout, output } = await run("npm", pack, { cwd: join(ROOT, "subsystem") });
  assert.equal(code, 0, output);
  const [{ filename, files }] = JSON.parse(stdout) as [{ filename: string; files: Array<{ path: string }> }];
  packed = files.map(({ path }) => path);
  const install = ["install", "--prefer-offline", "--no-fund", "--no-audit", "--ignore-scripts", join(project, filename)];
  const installed = await run("npm", install, { cwd: project });
  assert.equal(installed.code, 0, installed.output);
});
after(() => rm(project, { recursive: true, force: true }));

test("the package contains the code, its declarations and the contract, and nothing else", () => {
  for (const path of [
    "README.md",
    "dist/index.js",
    "dist/index.d.ts",
    "dist/gen/orchestrator.d.ts",
    "proto/dreamnet/subsystem/v1/subsystem.proto",
    "proto/dreamnet/orchestrator/v1/orchestrator.proto",
  ]) {
    assert.ok(packed.includes(path), `${path} is missing`);
  }
  assert.deepEqual(packed.filter((path) => !/^(README\.md|package\.json|(dist|proto)\/.*\.(js|d\.ts|proto))$/.test(path)), []);
});

test("the example of its README runs in the project that installed it", async () => {
  const readme = await readFile(join(project, "node_modules", "dreamnet-subsystem", "README.md"), "utf8");
  const [, example] = /^```js\n(\/\/ average\.mjs\n.*?)^```$/ms.exec(readme)!;
  const listening = 'onListening: (endpoint) => console.log("listening on", endpoint)';
  await writeFile(join(project, "average.mjs"), example!.replace("fleet.run()", `fleet.run({ ${listening} })`));
  const service = await startOrchestrator();
  atEnd(() => service.stop());
  const average = await start(process.execPath, [join(project, "average.mjs")], {
    ORCHESTRATOR_ADDRESS: `http://${service.address}`,
  });
  await untilRegistry(service.address, (all) => "average" in all);
  const { state, subsystems } = await cycle(service.address);
  assert.equal(state, "CYCLE_STATE_SUCCEEDED");
  assert.deepEqual(subsystems[0]!.issues.map(({ code }) => code), ["NOT_FRESH"]);
  assert.deepEqual(fromStruct(subsystems[0]!.output), {});
  assert.equal(await average.stop(), 0, average.log());
  assert.match(average.log(), /average is unregistered/);
});

test("a project in TypeScript has its declarations", async () => {
  const check = async (file: string, text: string) => {
    await writeFile(join(project, file), text);
    const args = ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2023", "--types", "node", file];
    return await run(join(ROOT, "node_modules", ".bin", "tsc"), args, { cwd: project });
  };
  const right = await check(
    "right.ts",
    `
    import { Cycle, Failure, Fleet, Orchestrator, type Input } from "dreamnet-subsystem";
    const fleet = new Fleet({ orchestrator: "http://127.0.0.1:7700", lease: "15s" });
    fleet.subsystem("average", { after: ["sensor"], timeout: "4s", retry: { maxAttempts: 5 } }, async (cycle: Cycle) => {
      const sensor: Input = cycle.inputs.get("sensor");
      if (sensor.freshness === "ABSENT") throw new Failure("no sensor", "NOT_FOUND");
      return { value: sensor.output.value ?? null };
    });
    fleet.subsystem("nothing", () => {});
    const { telemetry } = await new Orchestrator().call("RunCycle", { recordOutputs: true });
    const cycleId: number | undefined = telemetry?.cycleId;
    console.log(cycleId);
    await fleet.run();
    `,
  );
  assert.equal(right.code, 0, right.output);
  const wrong = await check(
    "wrong.ts",
    `
    import { Fleet, Orchestrator } from "dreamnet-subsystem";
    const fleet = new Fleet({ orchestrater: "http://127.0.0.1:7700" });
    fleet.subsystem("average", { timeout: 4 }, () => {});
    fleet.subsystem("average", () => 3);
    await new Orchestrator().call("RunCycles", {});
    `,
  );
  assert.notEqual(wrong.code, 0);
  const lines = [...wrong.output.matchAll(/^wrong\.ts\((\d+),/gm)].map(([, line]) => Number(line));
  assert.deepEqual(lines, [3, 4, 5, 6], wrong.output);
});
