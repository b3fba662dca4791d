// A process with some modules of the stand-in: `node standin-process.js SEED ORCHESTRATOR NAME…`. It sends their states
// to the process that started it, whenever that one asks.

import { serveSubsystems, type SubsystemName } from "dreamnet-modules";
import { standIn } from "./standin.js";

const [seed, orchestrator, ...names] = process.argv.slice(2) as [string, string, ...SubsystemName[]];
const order: string[] = [];
const modules = Object.fromEntries(names.map((name) => [name, standIn(name, Number(seed), order)]));
const served = await serveSubsystems(modules, { orchestrator });

process.on("message", () => {
  const states = Object.fromEntries(names.map((name) => [name, modules[name]!.state()]));
  process.send!({ states, order });
});
process.once("disconnect", () => void served.stop());
process.send!("ready");
