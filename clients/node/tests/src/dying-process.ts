// A process with DreamNet's modules, one of which ends it in its second run: `node dying-process.js ORCHESTRATOR NAME`.

import { serveSubsystems } from "dreamnet-modules";
import { NAMES } from "./standin.js";

const [orchestrator, dying] = process.argv.slice(2);
let runs = 0;
const run = (name: string) => () => {
  if (name === dying && ++runs === 2) process.kill(process.pid, "SIGKILL");
};
const modules = Object.fromEntries(NAMES.map((name) => [name, { run: run(name) }]));
const { address } = await serveSubsystems(modules, { orchestrator: orchestrator! });
console.log(`listening on ${address}`);
