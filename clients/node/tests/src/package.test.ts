// The packages as users have them: packed, installed from their files into an empty project and used there; and copied.

import assert from "node:assert/strict";
import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { fromStruct } from "../../subsystem/dist/objects.js";
import { atEnd, cycle, registered, run, start, startOrchestrator, untilRegistry } from "./support.js";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));

const PACKAGES = ["subsystem", "dreamnet"];

let project: string;
const packed = new Map<string, string[]>();
before(async () => {
  project = await mkdtemp(join(tmpdir(), "project-"));
  await writeFile(join(project, "package.json"), JSON.stringify({ name: "project", type: "module", private: true }));
  const files: string[] = [];
  for (const folder of PACKAGES) {
    const pack = ["pack", "--json", "--loglevel=error", "--ignore-scripts", "--pack-destination", project];
    const { code, stdout, output } = await run("npm", pack, { cwd: join(ROOT, folder) });
    assert.equal(code, 0, output);
    const [made] = JSON.parse(stdout) as [{ filename: string; files: Array<{ path: string }> }];
    packed.set(
      folder,
      made.files.map(({ path }) => path),
    );
    files.push(join(project, made.filename));
  }
  const install = ["install", "--prefer-offline", "--no-fund", "--no-audit", "--ignore-scripts", ...files];
  const installed = await run("npm", install, { cwd: project });
  assert.equal(installed.code, 0, installed.output);
});
after(() => rm(project, { recursive: true, force: true }));

test("the packages contain the code, its declarations and the protos, and nothing else", () => {
  const paths = {
    subsystem: [
      "dist/gen/orchestrator.d.ts",
      "proto/dreamnet/subsystem/v1/subsystem.proto",
      "proto/dreamnet/orchestrator/v1/orchestrator.proto",
    ],
    dreamnet: ["dist/worker.js", "dist/gen/modules.d.ts", "proto/dreamnet/modules/v1/modules.proto"],
  };
  for (const [folder, own] of Object.entries(paths)) {
    const files = packed.get(folder)!;
    for (const path of ["README.md", "dist/index.js", "dist/index.d.ts", ...own]) {
      assert.ok(files.includes(path), `${folder}: ${path} is missing`);
    }
    const fine = /^(README\.md|package\.json|(dist|proto)\/.*\.(js|d\.ts|proto))$/;
    assert.deepEqual(
      files.filter((path) => !fine.test(path)),
      [],
    );
  }
});

test("the example of the kit's README runs in the project that installed it", async () => {
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
  assert.deepEqual(
    subsystems[0]!.issues.map(({ code }) => code),
    ["NOT_FRESH"],
  );
  assert.deepEqual(fromStruct(subsystems[0]!.output), {});
  assert.equal(await average.stop(), 0, average.log());
  assert.match(average.log(), /average is unregistered/);
});

test("the example of the README for DreamNet's modules runs there too", async () => {
  const readme = await readFile(join(project, "node_modules", "dreamnet-modules", "README.md"), "utf8");
  const [, example] = /^```js\n(\/\/ example\.mjs\n.*?)^```$/ms.exec(readme)!;
  await writeFile(join(project, "example.mjs"), example!);
  const service = await startOrchestrator();
  atEnd(() => service.stop());
  const env = { ORCHESTRATOR_ADDRESS: `http://${service.address}` };
  const { code, output } = await run(process.execPath, ["example.mjs"], { cwd: project, env });
  assert.equal(code, 0, output);
  assert.match(output, /^\{\n? *cycleId: 1,/m);
  assert.match(output, /\{ memories: [1-9]\d* \}/);
  assert.deepEqual(await registered(service.address), {});
});

test("a copy of the folder builds", async () => {
  const copy = join(project, "copy");
  const made = /\/(node_modules|dist|gen)$/;
  await cp(ROOT, copy, { recursive: true, filter: (path) => !made.test(path) });
  const installed = await run("npm", ["ci", "--prefer-offline", "--silent"], { cwd: copy });
  assert.equal(installed.code, 0, installed.output);
  const built = await run("npm", ["run", "--silent", "build"], { cwd: copy });
  assert.equal(built.code, 0, built.output);
});

test("a project in TypeScript has their declarations", async () => {
  const check = async (file: string, text: string) => {
    await writeFile(join(project, file), text);
    const args = ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2023", "--types", "node", file];
    return await run(join(ROOT, "node_modules", ".bin", "tsc"), args, { cwd: project });
  };
  const right = await check(
    "right.ts",
    `
    import { Cycle, Failure, Fleet, Orchestrator, type Input } from "dreamnet-subsystem";
    import { OrchestratorCore, READ_ONLY, serveSubsystems, startIntervalLoop } from "dreamnet-modules";
    import type { ServeOptions } from "dreamnet-modules";
    const fleet = new Fleet({ orchestrator: "http://127.0.0.1:7700", lease: "15s" });
    fleet.subsystem("average", { after: ["sensor"], timeout: "4s", retry: { maxAttempts: 5 } }, async (cycle: Cycle) => {
      const sensor: Input = cycle.inputs.get("sensor");
      if (sensor.freshness === "ABSENT") throw new Failure("no sensor", "NOT_FOUND");
      return { value: sensor.output.value ?? null };
    });
    fleet.subsystem("nothing", () => {});
    const registrations = { total: { timeout: "30s" } };
    const options: ServeOptions = { readOnly: ["agents"], run: [READ_ONLY[0]], registrations };
    const total = { run: (_: unknown, cycle: Cycle) => cycle.cycleId };
    const { address }: { address: string } = await serveSubsystems({ total }, options);
    const loop: NodeJS.Timeout = startIntervalLoop({ FieldLayer: {} }, 5000);
    const cycles: number = OrchestratorCore.getStatus().totalCycles;
    console.log(address, loop, cycles);
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
    import { serveSubsystems, startIntervalLoop } from "dreamnet-modules";
    import { Fleet, Orchestrator } from "dreamnet-subsystem";
    const fleet = new Fleet({ orchestrater: "http://127.0.0.1:7700" });
    fleet.subsystem("average", { timeout: 4 }, () => {});
    fleet.subsystem("average", () => 3);
    await new Orchestrator().call("RunCycles", {});
    await serveSubsystems({}, { orchestrater: "127.0.0.1:7700" });
    await serveSubsystems({}, { registrations: { total: { timeout: 30 } } });
    startIntervalLoop({ FieldLayr: {} });
    `,
  );
  assert.notEqual(wrong.code, 0);
  const lines = [...wrong.output.matchAll(/^wrong\.ts\((\d+),/gm)].map(([, line]) => Number(line));
  assert.deepEqual(lines, [4, 5, 6, 7, 8, 9, 10], wrong.output);
});
