// A small stand-alone subsystem: its `value` is one more than the sum of its inputs' `value`.
//
//   node dist/src/subsystem.js --listen 127.0.0.1:0 --name total --orchestrator 127.0.0.1:7700 --reads sensor

import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { serveSubsystems, type Cycle } from "./dreamnet.js";

const { values: flags } = parseArgs({
  options: {
    listen: { type: "string", default: "127.0.0.1:50051" },
    name: { type: "string", default: "total" },
    orchestrator: { type: "string" },
    requires: { type: "string", default: "" },
    after: { type: "string", default: "" },
    reads: { type: "string", default: "" },
  },
});
const names = (list: string) => list.split(",").filter(Boolean);

class Total {
  private cycles = 0;
  private value = 0;

  async run(_context: unknown, cycle: Cycle) {
    // Stands for work that takes time. A call that is late or cancelled ends it, before anything has changed.
    const workMs = cycle.parameters.work_ms;
    if (typeof workMs === "number") await setTimeout(workMs, undefined, { signal: cycle.signal });
    this.cycles += 1;
    this.value = 1;
    for (const [name, { output }] of cycle.inputs) {
      if (typeof output?.value === "number") this.value += output.value;
      else cycle.issue("WARNING", "NO_VALUE", `${name} gave no value`);
    }
    cycle.metric("cycles", this.cycles);
    return this.status();
  }

  status() {
    return { value: this.value, cycles: this.cycles };
  }
}

const served = await serveSubsystems(
  { [flags.name]: Total },
  {
    listen: flags.listen,
    ...(flags.orchestrator && { orchestrator: flags.orchestrator }),
    registrations: {
      [flags.name]: { requires: names(flags.requires), after: names(flags.after), reads: names(flags.reads) },
    },
  },
);
for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => void served.stop());
console.log(`listening on ${served.address}`);
