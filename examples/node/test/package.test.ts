// This folder as users have it: copied to another place, and as a package with declarations.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { startOrchestrator, type Running } from "./support.js";

const HERE = fileURLToPath(new URL("../..", import.meta.url));
const MADE = ["node_modules", "dist", join("src", "gen")].map((made) => join(HERE, made));
const TSC = join(HERE, "node_modules", ".bin", "tsc");

let elsewhere: string;
let copy: string;
let service: Running;

before(async () => {
  elsewhere = await mkdtemp(join(tmpdir(), "dreamnet-"));
  copy = join(elsewhere, "subsystems");
  await cp(HERE, copy, { recursive: true, filter: (path) => !MADE.includes(path) });
  // Instead of `npm ci`.
  await symlink(join(HERE, "node_modules"), join(copy, "node_modules"));
  const built = await run("npm", ["run", "--silent", "build"], copy);
  assert.equal(built.code, 0, built.output);
  service = await startOrchestrator();
});
after(async () => {
  await service?.stop();
  await rm(elsewhere, { recursive: true, force: true });
});

async function run(command: string, args: string[], cwd: string, env = {}) {
  const child = spawn(command, args, { cwd, env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "pipe"] });
  let output = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => (output += data));
  const [code] = (await once(child, "close")) as [number | null];
  return { code, output };
}

/** A package beside the copy that depends on it. */
async function dependent(files: Record<string, string>): Promise<string> {
  const folder = join(elsewhere, "dependent");
  await mkdir(join(folder, "node_modules"), { recursive: true });
  await symlink(copy, join(folder, "node_modules", "dreamnet-subsystems"));
  await symlink(join(HERE, "node_modules", "@types"), join(folder, "node_modules", "@types"));
  await writeFile(join(folder, "package.json"), JSON.stringify({ name: "dependent", type: "module" }));
  for (const [file, text] of Object.entries(files)) await writeFile(join(folder, file), text);
  return folder;
}

const check = (folder: string, file: string) =>
  run(TSC, ["--noEmit", "--strict", "--module", "nodenext", "--target", "es2023", "--types", "node", file], folder);

test("a copied folder works with the README's example", async () => {
  const readme = await readFile(join(copy, "README.md"), "utf8");
  const [, path, example] = /^cat > (\S+) <<'EOF'\n(.*?)^EOF$/ms.exec(readme)!;
  await writeFile(join(copy, path!), example!);
  const { code, output } = await run(process.execPath, [path!], copy, { ORCHESTRATOR_ADDRESS: service.address });
  assert.equal(code, 0, output);
  assert.match(output, /cycleId: 1,/);
  assert.match(output, /totalCycles: [1-9]\d*,[\s\S]*\{ memories: [1-9]\d* \}/);
});

test("a package that depends on it has its declarations", async () => {
  const folder = await dependent({
    "right.ts": `
      import { getStatus, READ_ONLY, serveSubsystems, startIntervalLoop, type Cycle, type ServeOptions } from "dreamnet-subsystems";
      const options: ServeOptions = { readOnly: ["agents"], run: [READ_ONLY[0]], registrations: { total: { timeout: { seconds: 30 } } } };
      const total = { run: (_: unknown, cycle: Cycle) => cycle.metric("cycles", cycle.cycleId) };
      const { address }: { address: string } = await serveSubsystems({ total }, options);
      const loop: NodeJS.Timeout = startIntervalLoop({ FieldLayer: total }, 5000);
      const cycles: number = (await getStatus()).totalCycles;
      console.log(address, loop, cycles);
    `,
    "wrong.ts": `
      import { serveSubsystems, startIntervalLoop } from "dreamnet-subsystems";
      await serveSubsystems({}, { orchestrater: "127.0.0.1:7700" });
      await serveSubsystems({}, { registrations: { total: { timeout: 30 } } });
      startIntervalLoop({ FieldLayr: {} });
    `,
  });
  const right = await check(folder, "right.ts");
  assert.equal(right.code, 0, right.output);
  const { code, output } = await check(folder, "wrong.ts");
  assert.notEqual(code, 0);
  const lines = [...output.matchAll(/^wrong\.ts\((\d+),/gm)].map(([, line]) => Number(line));
  assert.deepEqual(lines, [3, 4, 5], output);
});

test("the package contains the code, its declarations and the contract", async () => {
  const { code, output } = await run("npm", ["pack", "--dry-run", "--json", "--loglevel=error"], copy);
  assert.equal(code, 0, output);
  const [{ files }] = JSON.parse(output) as [{ files: Array<{ path: string }> }];
  const paths = files.map(({ path }) => path);
  for (const path of [
    "dist/src/dreamnet.js",
    "dist/src/dreamnet.d.ts",
    "dist/src/gen/orchestrator.d.ts",
    "proto/dreamnet/subsystem/v1/subsystem.proto",
    "proto/dreamnet/orchestrator/v1/orchestrator.proto",
  ]) {
    assert.ok(paths.includes(path), `${path} is missing`);
  }
  assert.ok(!paths.some((path) => path.includes("test")), "no tests");
});
